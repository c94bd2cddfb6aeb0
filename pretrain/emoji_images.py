"""The 3,391 images of the npm package @lobehub/fluent-emoji-3d (MIT) as arrays, their Unicode names and groups.

    python pretrain/emoji_images.py --work_dir pretrain/work        # downloads, decodes, prints the counts
    python pretrain/emoji_images.py --work_dir pretrain/work --size 64 --sorted pretrain/work/emoji-by-group

The package has 256-px WebP files with an alpha channel, named by their code points. The names come from the PyPI
package `emoji`, the groups from the npm package `unicode-emoji-json` (MIT), which is fetched when groups are wanted.
Nothing else is downloaded. The decoded arrays are kept in `work_dir`, so a second start is instant. `--sorted` writes
the pictures into `training/GROUP` and `held-out/GROUP`, split by `held_out`.
"""

import argparse
import json
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
GROUPS_PACKAGE = "unicode-emoji-json@0.9.0"
SKIN_TONE = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")
# code points of Unicode's group of smileys
SMILEYS = [range(0x1F600, 0x1F650), range(0x1F910, 0x1F930), range(0x1F970, 0x1F97B), range(0x1F9D0, 0x1F9D1),
           range(0x1FAE0, 0x1FAEA), range(0x2639, 0x263B)]  # fmt: skip
DOMAINS = ("all", "people")


def fetch_package(work_dir):
    """The folder with the WebP files; downloads and unpacks the npm package into `work_dir` if it is missing."""
    assets = Path(work_dir) / "package" / "assets"
    if not assets.is_dir():
        unpack(PACKAGE, work_dir)
    return assets


def unpack(package, folder):
    """Download an npm package and unpack it into `folder`/package."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    archive = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.split()[-1]
    with tarfile.open(Path(folder) / archive) as tar:
        tar.extractall(folder, filter="data")


def unicode_name(filename):
    """Caption of a file: `1f469-200d-1f3a8.webp` -> "woman artist". An unknown sequence raises KeyError."""
    import emoji

    stem = Path(filename).stem
    if "_" in stem:  # the flags of England, Scotland and Wales: the file name lacks the closing tag
        stem += "_e007f"
    wanted = "".join(chr(int(code, 16)) for code in re.split("[-_]", stem)).replace("\ufe0f", "")
    if not hasattr(unicode_name, "names"):
        unicode_name.names = {key.replace("\ufe0f", ""): entry["en"] for key, entry in emoji.EMOJI_DATA.items()}
    return unicode_name.names[wanted].strip(":").replace("_", " ").replace("’", "'")


def concept(caption):
    """The caption without its skin tone. Images of one concept are all trained on or all held out."""
    return SKIN_TONE.sub("", caption)


def on_white(path, size):
    """A file as an RGB image of `size` x `size` px: composited on white, then resized with Lanczos."""
    image = Image.open(path).convert("RGBA")
    side = max(image.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def load_emoji(work_dir, size):
    """All images, uint8 (N, size, size, 3), and their N captions, in the order of file names."""
    assets = fetch_package(work_dir)
    files = sorted(path.name for path in assets.iterdir())
    captions = [unicode_name(name) for name in files]
    cache = Path(work_dir) / f"images-{size}.npy"
    if not cache.is_file():
        images = np.stack([np.asarray(on_white(assets / name, size)) for name in tqdm(files, desc="decoding")])
        np.save(cache, images)
    return np.load(cache), captions


def in_domain(work_dir, captions, domain):
    """Mask (N,) of the pictures of a domain, for the captions of `load_emoji`.

    domain: "all"; or "people": smileys, and everything that starts with the code point of a person or a hand, which
    are those that have skin tones.
    """
    firsts = [int(re.split("[-_.]", path.name)[0], 16) for path in sorted(fetch_package(work_dir).iterdir())]
    people = {first for first, caption in zip(firsts, captions, strict=True) if concept(caption) != caption}
    people.update(*SMILEYS)
    return np.array([domain == "all" or first in people for first in firsts])


def emoji_groups(work_dir):
    """The Unicode group of each picture of `load_emoji`, such as "Animals & Nature".

    The package lists emoji without skin tones. A picture has the group of its sequence without skin tones; of a pair
    of people with two skin tones, that of its first person.
    """
    listing = Path(work_dir) / "groups" / "package" / "data-by-emoji.json"
    if not listing.is_file():
        unpack(GROUPS_PACKAGE, Path(work_dir) / "groups")
    entries = json.loads(listing.read_text(encoding="utf-8"))
    groups = {sequence(emoji): entry["group"] for emoji, entry in entries.items()}
    found = []
    for path in sorted(fetch_package(work_dir).iterdir()):
        stem = path.stem + ("_e007f" if "_" in path.stem else "")
        points = sequence("".join(chr(int(code, 16)) for code in re.split("[-_]", stem)))
        found.append(groups[points] if points in groups else groups[points[0]])
    return found


def sequence(emoji):
    """An emoji without skin tones and without the selector of its coloured form."""
    return re.sub("[\U0001f3fb-\U0001f3ff\ufe0f]", "", emoji)


def write_sorted(work_dir, folder, size):
    """Write all pictures as PNG into folder/training/GROUP and folder/held-out/GROUP; return {group: their number}."""
    images, captions = load_emoji(work_dir, size)
    groups, counts = emoji_groups(work_dir), {}
    files = [path.stem for path in sorted(fetch_package(work_dir).iterdir())]
    for pixels, name, group, is_held_out in zip(images, files, groups, held_out(captions), strict=True):
        place = Path(folder) / ("held-out" if is_held_out else "training") / group
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{name}.png")
        counts[group] = counts.get(group, 0) + 1
    return counts


def held_out(captions, every=20):
    """Mask (N,) of held-out images: every `every`-th concept in alphabetical order, with all its skin tones."""
    concepts = sorted({concept(caption) for caption in captions})
    chosen = set(concepts[::every])
    return np.array([concept(caption) in chosen for caption in captions])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", default="pretrain/work")
    parser.add_argument("--size", type=int, default=72)
    parser.add_argument("--sorted", help="folder for PNG files, sorted by Unicode group and split")
    options = parser.parse_args()
    all_images, all_captions = load_emoji(options.work_dir, options.size)
    print(f"{len(all_images)} images, {len(set(all_captions))} captions, {held_out(all_captions).sum()} held out")
    if options.sorted:
        for name, count in sorted(write_sorted(options.work_dir, options.sorted, options.size).items()):
            print(f"{count:5}  {name}")

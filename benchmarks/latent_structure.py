"""Show that an error of latents says little about the picture: the paper's figure 12, as a picture and a table.

    python benchmarks/latent_structure.py                                        # the tiny autoencoders in examples/
    python benchmarks/latent_structure.py --model stabilityai/sdxl-vae --resolution 512 --pictures my-pictures

The latents of a picture are made half as large and large again by nearest, bilinear and bicubic interpolation. The
table has the error of the latents beside that of the decoded pictures, both against the latents as they were.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

from lpl_finetuning.data.formats import IMAGE_EXTENSIONS
from lpl_finetuning.data.images import open_image, prepare_image, to_pixel_values
from lpl_finetuning.errors import require
from lpl_finetuning.evaluation.onestep import high_power
from lpl_utils import LatentSpace
from preview_data import load_vae

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("nearest", "bilinear", "bicubic")


def parser_of(description, output):
    """The flags that the demonstrations share; output: name of the picture."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", default=[str(ROOT / "examples" / name) for name in ("tiny-sdxl", "tiny-sd3")],
        help="folders or Hub names of autoencoders, or of pipelines that have one")  # fmt: skip
    add("--pictures", type=Path, default=ROOT / "examples" / "fluent-emoji", help="folder of pictures")
    add("--resolution", type=int, default=64, help="of the pictures, px (default: %(default)s)")
    add("--count", type=int, default=96, help="pictures in the table (default: %(default)s)")
    add("--shown", type=int, default=3, help="pictures in the image (default: %(default)s)")
    add("--output", type=Path, default=Path(output), help="default: %(default)s")
    return parser


def load_pictures(folder, count, resolution):
    """(N, 3, H, W) in [-1, 1]: pictures of a folder, evenly chosen by name, cut to the centre square."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS)
    require(files, f"--pictures {folder} has no pictures: name a folder of some")
    chosen = [files[int(place)] for place in np.linspace(0, len(files) - 1, min(count, len(files)))]
    cut = [prepare_image(open_image(file.read_bytes(), str(file)), (resolution, resolution), True, False)[0]
           for file in chosen]  # fmt: skip
    return torch.stack([to_pixel_values(pixels) for pixels in cut])


@torch.no_grad()
def encode(vae, pictures):
    """Means of the posterior of pictures, in model space, (N, C, h, w)."""
    means = [vae.encode(picture[None].to(vae.device)).latent_dist.mean for picture in pictures]
    return LatentSpace.of(vae).to_model(torch.cat(means))


@torch.no_grad()
def decode(vae, latents):
    """Decoded pictures (N, 3, H, W) of latents in model space, clipped to [-1, 1]."""
    space = LatentSpace.of(vae)
    return torch.cat([vae.decode(space.from_model(z[None])).sample for z in latents]).clamp(-1, 1)


def down_and_up(latents, method):
    """Latents made half as large and as large again."""
    small = F.interpolate(latents, scale_factor=0.5, mode=method)
    return F.interpolate(small, size=latents.shape[2:], mode=method)


def measure(vae, pictures):
    """({method: numbers}, {column: pictures (N, 3, H, W)}) of one autoencoder."""
    latents = encode(vae, pictures)
    columns = {"picture": pictures.to(latents.device), "decoded": decode(vae, latents)}
    numbers = {}
    for method in METHODS:
        changed = down_and_up(latents, method)
        columns[method] = decode(vae, changed)
        error = (columns[method] - columns["decoded"]).square().mean(dim=(1, 2, 3))
        numbers[method] = {
            "latents": (changed - latents).square().mean().item() / latents.var(dim=(2, 3)).mean().item(),
            "psnr": (10 * torch.log10(4 / error)).mean().item(),
            "high": (high_power(columns[method]) / high_power(columns["decoded"])).log().mean().item(),
        }
    return numbers, {name: values.cpu() for name, values in columns.items()}


def draw(results, shown, path):
    """The picture: a block of rows for each autoencoder, a column for each interpolation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(name, row) for name in results for row in range(shown)]
    width = 2 + len(METHODS)
    figure, axes = plt.subplots(
        len(rows), width, figsize=(1.9 * width, 2.05 * len(rows)), squeeze=False, layout="constrained"
    )
    for (name, row), line in zip(rows, axes, strict=True):
        numbers, columns = results[name]
        for axis, (column, pictures) in zip(line, columns.items(), strict=True):
            place = int(np.linspace(0, len(pictures) - 1, shown)[row])
            axis.imshow((pictures[place].permute(1, 2, 0).numpy() + 1) / 2)
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                said = numbers.get(column)
                axis.set_title(column if said is None else f"{column}\nlatent error {said['latents']:.3f}\n"
                               f"PSNR {said['psnr']:.1f} dB", fontsize=9)  # fmt: skip
        line[0].set_ylabel(name if row == 0 else "", fontsize=9)
    figure.suptitle("Latents halved and enlarged again, decoded")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    """Measure, print the table, draw the picture."""
    args = parser_of(__doc__, "latent-structure.png").parse_args(argv)
    pictures = load_pictures(args.pictures, args.count, args.resolution)
    results = {Path(name).name: measure(load_vae(name, flag="--model"), pictures) for name in args.model}
    print("| autoencoder | interpolation | latent error / variance | PSNR of the pictures, dB | log power of high "
          "frequencies |\n|---|---|---:|---:|---:|")  # fmt: skip
    for name, (numbers, _) in results.items():
        for method, said in numbers.items():
            print(f"| {name} | {method} | {said['latents']:.3f} | {said['psnr']:.2f} | {said['high']:+.2f} |")
    draw(results, min(args.shown, len(pictures)), args.output)
    print(f"\n{len(pictures)} pictures; the picture: {args.output}")


if __name__ == "__main__":
    main()

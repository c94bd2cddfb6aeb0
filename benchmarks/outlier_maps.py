"""Show where the decoder's features have outliers: the paper's figure 3, as a picture and a table.

    python benchmarks/outlier_maps.py                                            # the tiny autoencoders in examples/
    python benchmarks/outlier_maps.py --model stabilityai/sdxl-vae --resolution 512 --pictures my-pictures

For each stage that the loss masks (at least half the picture's size): the largest magnitude over channels, in standard
deviations of the channel, and the share of channels that the mask leaves out at each position.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.latent_structure import encode, load_pictures, parser_of
from lpl_utils import DecoderStages, inlier_mask, morphology_kernels, stage_features
from preview_data import load_vae


@torch.no_grad()
def maps_of(vae, latents, resolution, reference=None):
    """{stage: (magnitude (N, H, W) in deviations, share of channels left out (N, H, W))} of the masked stages."""
    stages, found = DecoderStages(vae), {}
    for z in latents.split(1):
        for name, x in zip(stages.names, stage_features(stages, z), strict=True):
            kernels = morphology_kernels(x.shape[2] / resolution, (resolution, resolution), reference)
            if kernels is None:
                continue
            centred = x - x.mean(dim=(2, 3), keepdim=True)
            deviations = centred.abs() / centred.square().mean(dim=(2, 3), keepdim=True).sqrt().clamp_min(1e-6)
            outside = 1 - inlier_mask(x, kernels).float()
            found.setdefault(name, []).append((deviations.amax(dim=1)[0].cpu(), outside.mean(dim=1)[0].cpu()))
    return {name: tuple(torch.stack(each) for each in zip(*pairs, strict=True)) for name, pairs in found.items()}


def draw(results, pictures, shown, path):
    """The picture: rows of pictures, for each stage the magnitude and the share of channels left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = np.linspace(0, len(pictures) - 1, shown).astype(int)
    stages = max(len(maps) for maps in results.values())
    rows, width = [(name, place) for name in results for place in chosen], 1 + 2 * stages
    size = 1.8 * width, 1.95 * len(rows)
    figure, axes = plt.subplots(len(rows), width, figsize=size, squeeze=False, layout="constrained")
    for (name, place), line in zip(rows, axes, strict=True):
        line[0].imshow((pictures[place].permute(1, 2, 0).numpy() + 1) / 2)
        line[0].set_ylabel(name if place == chosen[0] else "", fontsize=9)
        for number, (stage, (magnitude, outside)) in enumerate(results[name].items()):
            left, right = line[1 + 2 * number : 3 + 2 * number]
            left.imshow(magnitude[place], cmap="magma", vmin=0, vmax=magnitude.max())
            right.imshow(outside[place], cmap="gray_r", vmin=0, vmax=max(0.05, outside.max().item()))
            if place == chosen[0]:
                left.set_title(f"{stage}: magnitude\nup to {magnitude.max():.0f} deviations", fontsize=8)
                right.set_title(f"left out\nup to {100 * outside.max():.0f} % of channels", fontsize=8)
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
    figure.suptitle("Outliers of decoder features")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    """Measure, print the table, draw the picture."""
    parser = parser_of(__doc__, "outlier-maps.png")
    parser.add_argument("--reference_resolution", type=float, default=256, help="resolution in px at which the mask "
                        "has its original margin; 0: the same margin at any size (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    pictures = load_pictures(args.pictures, args.count, args.resolution)
    results = {}
    for name in args.model:
        vae = load_vae(name, flag="--model")
        latents, reference = encode(vae, pictures), args.reference_resolution or None
        results[Path(name).name] = maps_of(vae, latents, args.resolution, reference)
    print("| autoencoder | stage | left out, % | pictures with outliers, % | largest, deviations |")
    print("|---|---|---:|---:|---:|")
    for name, maps in results.items():
        for stage, (magnitude, outside) in maps.items():
            some = 100 * (outside.amax(dim=(1, 2)) > 0).float().mean()
            print(f"| {name} | {stage} | {100 * outside.mean():.3f} | {some:.0f} | {magnitude.max():.1f} |")
    draw(results, pictures, min(args.shown, len(pictures)), args.output)
    print(f"\n{len(pictures)} pictures; the picture: {args.output}")


if __name__ == "__main__":
    main()

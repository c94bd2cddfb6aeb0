"""Measure time and memory of the loss on the SDXL-sized decoder, against other versions and a tiny decoder in one run.

    python benchmarks/bench_lpl.py                                     # 256 px, float32 and bfloat16; CUDA if there is
    python benchmarks/bench_lpl.py --resolution 512 --dtypes bfloat16 --batch_size 2 --output bench.json

All versions compute forward and backward down to the estimate, on one batch with random weights:
  floor     plain PyTorch, three passes alone: target forward, estimate forward, input gradient;
            no masks, no loss (the gradient starts from ones on the last feature map)
  textbook  all features of both sides in two lists, each block under torch.utils.checkpoint, then the loss;
            same masks and normalization as ours
  ours      LatentPerceptualLoss, checkpointing="none";  ours-stage: checkpointing="stage"
  tiny      LatentPerceptualLoss of an AutoencoderTiny of taesdxl's size, to the full resolution;  tiny-2: without its
            last stage, up to half the resolution;  each with -stage too
The column /full compares time and memory with the full decoder's loss under the same checkpointing.
Times are medians over rounds in which the versions take turns. Ratios are medians of the rounds' ratios. Memory is the
peak above an idle process that has made one call at 64 px; each version runs in its own process.

How near a tiny decoder's gradient is to the full decoder's, on a pipeline and pictures that it was not trained on:

    python benchmarks/bench_lpl.py --pipeline examples/tiny-sdxl --tiny_decoder FOLDER --pictures FOLDER

The estimates are the pipeline's own, at the noise levels of the one-step test. The table has the cosine between the
gradients towards the estimate, as the mean over pictures, of each other loss with the full decoder's.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from torch.utils.checkpoint import checkpoint

from lpl_finetuning.data.scan import scan_folder
from lpl_finetuning.data.tables import select
from lpl_finetuning.evaluation.onestep import OneStepSettings, PipelineEstimate, held_out_of, levels_of, noisy
from lpl_finetuning.networks.latent_classifier import load_latent_classifier
from lpl_utils import (
    DecoderStages,
    IdentityStages,
    LatentPerceptualLoss,
    LPLConfig,
    SelectedStages,
    TinyDecoderStages,
    first_input,
    layer_loss,
    morphology_kernels,
    stage_features,
)

VERSIONS = ("floor", "textbook", "ours", "ours-stage", "tiny", "tiny-stage", "tiny-2", "tiny-2-stage")


def parse_args(argv=None):
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=256, help="of the decoded images, px")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--norm_type", default="standard")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=128, help="of the decoder's last stage; 128 for SDXL")
    parser.add_argument("--contiguous", action="store_true", help="keep the decoder's weights out of channels-last")
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), choices=VERSIONS, help="those to measure")
    parser.add_argument("--pipeline", help="measure cosines on this pipeline instead")
    parser.add_argument("--tiny_decoder", help="AutoencoderTiny of its autoencoder")
    parser.add_argument("--classifier", help="latent classifier of its autoencoder, as a further row")
    parser.add_argument("--pictures", default="examples/fluent-emoji", help="folder of captioned pictures")
    parser.add_argument("--number", type=int, default=64, help="pictures that are used")
    parser.add_argument("--output", help="write the figures to this JSON file")
    parser.add_argument("--memory_of", choices=VERSIONS, help=argparse.SUPPRESS)  # for child processes: print one peak
    return parser.parse_args(argv)


def build(args, dtype, device):
    """The decoder of SDXL's autoencoder with random weights, and a pair of latents."""
    torch.manual_seed(0)
    width = args.width
    vae = AutoencoderKL(
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        scaling_factor=0.13025,
    )
    vae.encoder = vae.quant_conv = None
    vae = torch.nn.Module.to(vae, device, dtype).requires_grad_(False).eval()  # diffusers' own warns of nothing
    if not args.contiguous:
        vae = vae.to(memory_format=torch.channels_last)
    side = args.resolution // 8
    target = torch.randn(args.batch_size, 4, side, side, device=device)
    return vae, target, target + 0.3 * torch.randn_like(target)


def floor(stages, target, estimate):
    """The gradient of three passes and nothing else, by plain autograd."""
    source = estimate.detach().requires_grad_()
    with torch.no_grad():
        for _ in stage_features(stages, target):
            pass
    *_, xh = stage_features(stages, source)  # the list of features holds no more than their graph
    return torch.autograd.grad(xh, source, torch.ones_like(xh))[0]


def textbook_mask(x, kernels):
    """The outlier mask by kthvalue and max pooling, as it is usually written."""
    rows = x.flatten(2)
    n = rows.shape[-1]
    margin = 2 * rows.std(dim=-1)
    low = rows.kthvalue(max(1, int(0.02 * n)), dim=-1).values - margin
    high = rows.kthvalue(max(1, int(0.98 * n)), dim=-1).values + margin
    inlier = ((x > low[..., None, None]) & (x < high[..., None, None])).float()
    inlier = F.max_pool2d(inlier, kernels[0], stride=1, padding=kernels[0] // 2)
    return -F.max_pool2d(-inlier, kernels[1], stride=1, padding=kernels[1] // 2) > 0.5


def textbook(stages, target, estimate, norm_type):
    """The gradient of the loss as it is usually written: two lists of features, block checkpointing, then the loss."""
    source = estimate.detach().requires_grad_()
    with torch.no_grad():
        features = list(stage_features(stages, target))
    xh, estimated = first_input(stages, source), []
    for index in range(len(stages)):
        estimated.append(xh := checkpoint(stages.run, index, xh, use_reentrant=False))
    image_size = features[-1].shape[2:]
    total = 0
    for x, xh in zip(features, estimated, strict=True):
        x, xh = x.float(), xh.float()
        kernels = morphology_kernels(x.shape[2] / image_size[0], image_size)
        mask = textbook_mask(x, kernels) if kernels else None
        weight = features[0].shape[2] / x.shape[2] / len(features)
        total = total + weight * layer_loss(x, xh, mask, norm_type, "mse", "none")
    return torch.autograd.grad(total.sum(), source)[0]


def ours(stages, target, estimate, norm_type, checkpointing="none", **more):
    """The gradient of `LatentPerceptualLoss`, none of it through the deviation, as that of `textbook`."""
    source = estimate.detach().requires_grad_()
    more |= {"norm_type": norm_type, "norm_gradient": "none", "checkpointing": checkpointing}
    lpl = LatentPerceptualLoss(stages, LPLConfig(**more))
    return torch.autograd.grad(lpl(source, target).per_sample.sum(), source)[0]


def tiny_stages(args, like, num_blocks):
    """The stages of an `AutoencoderTiny` with random weights, half as wide as the full decoder's last stage.

    like: a parameter with its dtype and device.
    """
    torch.manual_seed(0)
    tiny = AutoencoderTiny(decoder_block_out_channels=(args.width // 2,) * 4)
    tiny.encoder = None
    tiny = torch.nn.Module.to(tiny, like.device, like.dtype).requires_grad_(False).eval()
    return TinyDecoderStages(tiny if args.contiguous else tiny.to(memory_format=torch.channels_last), num_blocks)


def versions(args, vae, target, estimate):
    """{name: function without arguments that returns the gradient} of the versions in --versions."""
    stages, like = DecoderStages(vae), vae.decoder.conv_in.weight
    networks = {"ours": stages, "tiny": tiny_stages(args, like, 3), "tiny-2": tiny_stages(args, like, 2)}
    functions = {
        "floor": lambda: floor(stages, target, estimate),
        "textbook": lambda: textbook(stages, target, estimate, args.norm_type),
    }
    for name, network in networks.items():
        for suffix, checkpointing in (("", "none"), ("-stage", "stage")):
            call = functools.partial(ours, network, target, estimate, args.norm_type, checkpointing)
            functions[name + suffix] = call
    return {name: functions[name] for name in VERSIONS if name in args.versions}


def resident():
    """Resident memory of this process, bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_memory(function, device):
    """Peak memory of a call above the memory before it, bytes; on the CPU sampled every 2 ms."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    before, peak, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return peak[0] - before


def measure(args, dtype_name, device):
    """One row of figures per version, for one dtype."""
    vae, target, estimate = build(args, getattr(torch, dtype_name), device)
    functions = versions(args, vae, target, estimate)
    gradients = {name: function() for name, function in functions.items()}  # also warms up
    times = {name: [] for name in functions}
    for _ in range(args.rounds):
        for name, function in functions.items():
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    rows = []
    for name in functions:
        child = [sys.executable, __file__, "--memory_of", name, "--dtypes", dtype_name, "--norm_type", args.norm_type]
        child += ["--resolution", args.resolution, "--batch_size", args.batch_size, "--width", args.width]
        child += ["--contiguous"] * args.contiguous
        # freed memory returns to the system at once, in all versions; else the C library's reserve is measured
        limits = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
        printed = subprocess.run(
            [str(word) for word in child], check=True, capture_output=True, env={**os.environ, **limits}
        ).stdout
        memory = int(printed.split()[-1])
        seconds = statistics.median(times[name])
        rows.append(dict(dtype=dtype_name, version=name, seconds=seconds, memory_mb=memory / 1e6))
        reference = gradients.get("textbook")
        if reference is not None and not name.startswith("tiny"):
            rows[-1]["gradient_error"] = ((gradients[name] - reference).norm() / reference.norm()).item()
    add_ratios(rows, times)
    return rows


def add_ratios(rows, times):
    """Add the ratios of time and memory to those of other versions that were measured. times: {version: [seconds]}."""
    memory = {row["version"]: row["memory_mb"] for row in rows}
    for row in rows:
        full = "ours-stage" if row["version"].endswith("-stage") else "ours"
        for key, other in {"textbook": "textbook", "floor": "floor", "full": full}.items():
            if other in times:
                pairs = zip(times[row["version"]], times[other], strict=True)
                row[f"vs_{key}"] = statistics.median(a / b for a, b in pairs)
                row[f"memory_vs_{key}"] = row["memory_mb"] / memory[other]


def main(argv=None):
    """Measure, print the table and write it."""
    args = parse_args(argv)
    if args.pipeline:
        print_cosines(args)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.memory_of:
        args.versions = [args.memory_of]
        vae, target, estimate = build(args, getattr(torch, args.dtypes[0]), device)
        versions(args, vae, target[..., :8, :8], estimate[..., :8, :8])[args.memory_of]()  # loads the libraries' code
        print(peak_memory(versions(args, vae, target, estimate)[args.memory_of], device))
        return
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    print(f"{date.today()}, {name}, torch {torch.__version__}, {args.resolution} px, batch {args.batch_size}, "
          f"norm {args.norm_type}, {'contiguous' if args.contiguous else 'channels-last'}")  # fmt: skip
    heads = ("version", "seconds", "/textbook", "/floor", "/full", "MB", "/textbook", "/full", "gradient")
    print("{:9} {:12} {:>8} {:>9} {:>7} {:>6} {:>7} {:>9} {:>6} {:>9}".format("dtype", *heads))
    table = []
    for dtype_name in args.dtypes:
        for row in measure(args, dtype_name, device):
            table.append(row)
            print(line_of(row), flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps({"machine": name, "date": str(date.today()), "rows": table}, indent=2))


def line_of(row):
    """A row of the table; a figure that was not measured is a dash."""

    def shown(key, form):
        return format(row[key], form) if key in row else "-"

    return (
        f"{row['dtype']:9} {row['version']:12} {row['seconds']:8.3f} {shown('vs_textbook', '.2f'):>9} "
        f"{shown('vs_floor', '.2f'):>7} {shown('vs_full', '.3f'):>6} {row['memory_mb']:7.0f} "
        f"{shown('memory_vs_textbook', '.2f'):>9} {shown('memory_vs_full', '.3f'):>6} "
        f"{shown('gradient_error', '.1e'):>9}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Cosines of gradients


def compared_networks(args, vae):
    """{name: (`FeatureStages`, more options of `LPLConfig`)} whose gradients are compared; the full decoder first."""
    full = {"outlier_reference_resolution": 256}
    networks = {"decoder": (DecoderStages(vae), full)}
    if args.tiny_decoder:
        tiny = AutoencoderTiny.from_pretrained(args.tiny_decoder).requires_grad_(False).eval()
        networks |= {f"tiny, {count} up blocks": (TinyDecoderStages(tiny, count), full) for count in (3, 2, 1)}
    networks |= {f"decoder, {count} up blocks": (DecoderStages(vae, count), full) for count in (3, 2)}
    if args.classifier:
        classifier = load_latent_classifier(args.classifier)
        networks["classifier"] = (SelectedStages(classifier, range(len(classifier) - 1)), {})
    networks["latent"] = (IdentityStages(), {})
    return networks


def measure_cosines(args):
    """{network: [mean cosine with the full decoder's gradient at each level]}, and the levels' log-SNR."""
    pipeline, settings = DiffusionPipeline.from_pretrained(args.pipeline), OneStepSettings()
    images = scan_folder(args.pictures).images
    count = min(args.number, len(images))
    chosen = select(images, np.linspace(0, len(images) - 1, count).round().astype(int))
    held_out, levels = held_out_of(pipeline, chosen, 64, settings), levels_of(pipeline, settings.levels)
    estimate = PipelineEstimate(pipeline, held_out, levels)
    networks = compared_networks(args, pipeline.vae.requires_grad_(False))
    sums = {name: np.zeros(len(settings.levels)) for name in networks}
    for indices in (list(range(first, min(first + 16, count))) for first in range(0, count, 16)):
        z0 = torch.stack([held_out.latents[index] for index in indices])
        for level in range(len(settings.levels)):
            with torch.no_grad():
                z0_pred = estimate(noisy(z0, level, indices, levels, settings)[0], level, indices)
            gradients = {name: ours(stages, z0, z0_pred, args.norm_type, **more).flatten(1)
                         for name, (stages, more) in networks.items()}  # fmt: skip
            for name, gradient in gradients.items():
                sums[name][level] += F.cosine_similarity(gradient, gradients["decoder"]).sum().item() / count
    return {name: values.tolist() for name, values in sums.items()}, settings.levels


def print_cosines(args):
    """Measure the cosines, print the table and write it."""
    found, levels = measure_cosines(args)
    print(f"{date.today()}, {args.pipeline}, {args.number} pictures of {args.pictures}, norm {args.norm_type}")
    print(f"{'log SNR':20}" + "".join(f"{level:7.1f}" for level in levels) + "   mean")
    for name, cosines in found.items():
        print(f"{name:20}" + "".join(f"{value:7.3f}" for value in [*cosines, statistics.mean(cosines)]))
    if args.output:
        content = {"date": str(date.today()), "log_snr": list(levels), "cosines": found}
        Path(args.output).write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()

"""Measure time and memory of the loss on the SDXL-sized decoder, against two other versions in one run.

    python benchmarks/bench_lpl.py                                     # 256 px, float32 and bfloat16; CUDA if there is
    python benchmarks/bench_lpl.py --resolution 512 --dtypes bfloat16 --batch_size 2 --output bench.json

All versions compute forward and backward down to the estimate, on one batch with random weights:
  floor     plain PyTorch, three passes alone: target forward, estimate forward, input gradient;
            no masks, no loss (the gradient starts from ones on the last feature map)
  textbook  all features of both sides in two lists, each block under torch.utils.checkpoint, then the loss;
            same masks and normalization as ours
  ours      LatentPerceptualLoss, checkpointing="none";  ours-stage: checkpointing="stage"
Times are medians over rounds in which the versions take turns. Ratios are medians of the rounds' ratios. Memory is the
peak above an idle process that has made one call at 64 px; each version runs in its own process.
"""

import argparse
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

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch.utils.checkpoint import checkpoint

from lpl_utils import (
    DecoderStages,
    LatentPerceptualLoss,
    LPLConfig,
    first_input,
    layer_loss,
    morphology_kernels,
    stage_features,
)

VERSIONS = ("floor", "textbook", "ours", "ours-stage")


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
    vae = vae.to(device, dtype).requires_grad_(False).eval()
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
        total = total + weight * layer_loss(x, xh, mask, norm_type, "mse")
    return torch.autograd.grad(total.sum(), source)[0]


def ours(vae, target, estimate, norm_type, checkpointing):
    """The gradient of `LatentPerceptualLoss`."""
    source = estimate.detach().requires_grad_()
    lpl = LatentPerceptualLoss(vae, LPLConfig(norm_type=norm_type, checkpointing=checkpointing))
    return torch.autograd.grad(lpl(source, target).per_sample.sum(), source)[0]


def versions(args, vae, target, estimate):
    """{name: function without arguments that returns the gradient} of all versions."""
    stages = DecoderStages(vae)
    return {
        "floor": lambda: floor(stages, target, estimate),
        "textbook": lambda: textbook(stages, target, estimate, args.norm_type),
        "ours": lambda: ours(vae, target, estimate, args.norm_type, "none"),
        "ours-stage": lambda: ours(vae, target, estimate, args.norm_type, "stage"),
    }


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
    reference = gradients["textbook"]
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
        difference = (gradients[name] - reference).norm() / reference.norm()
        ratio = {
            other: statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))
            for other in ("textbook", "floor")
        }
        rows.append(
            dict(dtype=dtype_name, version=name, seconds=statistics.median(times[name]), vs_textbook=ratio["textbook"],
                 vs_floor=ratio["floor"], memory_mb=memory / 1e6, gradient_error=difference.item())
        )  # fmt: skip
    for row in rows:
        row["memory_vs_textbook"] = row["memory_mb"] / rows[1]["memory_mb"]
    return rows


def main(argv=None):
    """Measure, print the table and write it."""
    args = parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.memory_of:
        vae, target, estimate = build(args, getattr(torch, args.dtypes[0]), device)
        versions(args, vae, target[..., :8, :8], estimate[..., :8, :8])[args.memory_of]()  # loads the libraries' code
        print(peak_memory(versions(args, vae, target, estimate)[args.memory_of], device))
        return
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    print(f"{date.today()}, {name}, torch {torch.__version__}, {args.resolution} px, batch {args.batch_size}, "
          f"norm {args.norm_type}, {'contiguous' if args.contiguous else 'channels-last'}")  # fmt: skip
    heads = ("version", "seconds", "/textbook", "/floor", "MB", "/textbook", "gradient")
    print("{:9} {:11} {:>8} {:>9} {:>7} {:>7} {:>9} {:>9}".format("dtype", *heads))
    table = []
    for dtype_name in args.dtypes:
        for row in measure(args, dtype_name, device):
            table.append(row)
            print(f"{row['dtype']:9} {row['version']:11} {row['seconds']:8.3f} {row['vs_textbook']:9.2f} "
                  f"{row['vs_floor']:7.2f} {row['memory_mb']:7.0f} {row['memory_vs_textbook']:9.2f} "
                  f"{row['gradient_error']:9.1e}", flush=True)  # fmt: skip
    if args.output:
        Path(args.output).write_text(json.dumps({"machine": name, "date": str(date.today()), "rows": table}, indent=2))


if __name__ == "__main__":
    main()

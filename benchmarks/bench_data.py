"""What the data side costs: scanning, memory, waiting for batches, encoding. No GPU, no download; Linux.

    python benchmarks/bench_data.py                                    # everything; about eleven minutes
    python benchmarks/bench_data.py scan --counts 1000                 # one part, on another number of pictures
    python benchmarks/bench_data.py memory loader --output bench.json

  scan    a folder of 512 px JPEGs with caption files: seconds of the first scan and of the second, and how many files
          of the folder the second opens (by an audit hook of Python): the captions
  memory  real runs of train_sdxl_lpl.py, a LoRA of the tiny SDXL, 64 px, 40 steps, with everything in the caches:
          seconds from the start of the process to its first step, and its resident memory after the last
  loader  a real run, the whole tiny SDXL with LPL, batch 16, 100 steps: which share of a step is spent waiting for the
          next batch, with 0 and with 2 workers
  encode  `encode_missing` on 512 px JPEGs, cut to 64 px, and the tiny autoencoder: images opened while it works,
          against one after the other, in turns

The JPEGs are smooth noise, shapes and grain, 200 different ones at quality 90; each file has a comment of its own, so
all contents differ. For memory and loader, every picture is a real PNG of 64 px in one colour of its own, listed in
metadata.jsonl with a caption of its own; the scan reads them all. The first 16 are encoded by the models; the stores
get random numbers of the same shape under the keys of all others, since encoding says nothing about the runs that come
after it. Files were written shortly before, so they are read from the page cache.
"""

# ruff: noqa: E402
import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import platform
import runpy
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from lpl_finetuning import errors
from lpl_finetuning.data.encoding import encode_missing
from lpl_finetuning.data.scan import find_images, scan_folder
from lpl_finetuning.data.store import TensorStore
from lpl_finetuning.files import cache_folder
from lpl_finetuning.flags import caption_rules, data_source, framing_rules

COUNTS = {"scan": [10_000], "memory": [1_000, 10_000, 100_000], "loader": [10_000], "encode": [256]}
DIFFERENT = 200  # JPEGs
WARM_UP = 10  # steps that are not counted
MEGABYTE = 2**20


def parse_args(argv=None):
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="scan|memory|loader|encode", help="default: all")
    parser.add_argument("--counts", nargs="+", type=int, help="numbers of pictures, instead of each part's own")
    parser.add_argument("--steps", type=int, help="of the training runs, instead of each part's own")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement; the best is shown")
    parser.add_argument("--folder", help="where pictures and caches are made for a while (default: a temporary one)")
    parser.add_argument("--output", help="write the figures to this JSON file")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # FILE STARTED FLAGS...: a run
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in COUNTS:
            parser.error(f"unknown part {part}; choose from {', '.join(COUNTS)}")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def photograph(rng, size=512):
    """A JPEG of smooth noise, shapes and grain: bytes."""
    pixels = np.zeros((size, size, 3), np.float32)
    for side in (4, 8, 16, 32, 64, 128):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        pixels += np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC), np.float32) * (1.5 / side**0.5)
    image = Image.fromarray(np.clip(pixels * (255 / pixels.max()), 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        draw.polygon([tuple(map(int, point)) for point in rng.integers(0, size, (4, 2))],
                     fill=tuple(map(int, rng.integers(0, 256, 3))))  # fmt: skip
    grain = rng.normal(0, 4, (size, size, 1))
    file = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_photographs(folder, count):
    """Captioned JPEGs, 500 to a folder, each with a comment of its own."""
    rng = np.random.default_rng(0)
    pictures = [photograph(rng) for _ in tqdm(range(min(count, DIFFERENT)), "drawing", leave=False)]
    for number in tqdm(range(count), "writing JPEGs", leave=False):
        place = folder / f"{number // 500:04}"
        place.mkdir(parents=True, exist_ok=True)
        data, comment = pictures[number % len(pictures)], f"{number:08}".encode()
        comment = b"\xff\xfe" + struct.pack(">H", 2 + len(comment)) + comment
        (place / f"{number:08}.jpg").write_bytes(data[:2] + comment + data[2:])
        (place / f"{number:08}.txt").write_text(f"a photograph of hill {number} in the fog")


def png_chunk(kind, data):
    """A chunk of a PNG file: bytes."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def make_squares(folder, count, side=64):
    """PNGs of one colour each, 1,000 to a folder, and metadata.jsonl."""
    folder.mkdir(parents=True)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    with open(folder / "metadata.jsonl", "w") as listing:
        for number in tqdm(range(count), "writing PNGs", leave=False):
            name = f"{number // 1000:04}/{number:08}.png"
            if number % 1000 == 0:
                (folder / name).parent.mkdir()
            rows = (b"\0" + number.to_bytes(3, "big") * side) * side
            body = png_chunk(b"IDAT", zlib.compress(rows, 1)) + png_chunk(b"IEND", b"")
            (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
            row = {"file_name": name, "text": f"a square of colour {number}, flat, plain, number {number} of {count}"}
            listing.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Scanning


class Opened:
    """Context that counts the files below a folder which Python opens, in any thread."""

    folder, count, hooked = None, 0, False

    def __init__(self, folder):
        Opened.folder, Opened.count = f"{os.path.realpath(folder)}/", 0
        if not Opened.hooked:  # a hook stays until the process ends
            sys.addaudithook(Opened.hook)
            Opened.hooked = True

    @staticmethod
    def hook(event, arguments):
        if event == "open" and Opened.folder and str(arguments[0]).startswith(Opened.folder):
            Opened.count += 1

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        Opened.folder = None


def measure_scan(args, count, work):
    """Rows: first and second scan."""
    pictures = work / "pictures"
    make_photographs(pictures, count)
    size = sum(path.stat().st_size for path in pictures.rglob("*.jpg"))
    results = {"first": [], "second": []}
    for number in range(args.rounds):
        for which in results:
            with Opened(pictures) as opened:
                started = time.perf_counter()
                scan = scan_folder(pictures, cache_dir=work / f"cache-{number}", show=True)
                results[which].append((time.perf_counter() - started, opened.count))
            assert len(scan.images) == count and not scan.warnings
    return [
        {"part": "scan", "images": count, "format_bytes": size / 1e6, "scan": which, "seconds": min(values)[0],
         "slowest": max(values)[0], "files opened": min(values)[1]}
        for which, values in results.items()
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# A real run, watched


def resident(name="VmRSS"):
    """Bytes of a line of /proc/self/status."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])


class Watched:
    """An iterator of batches that notes when each was asked for, and how long that took."""

    def __init__(self, batches, notes):
        self.batches, self.notes = batches, notes

    def __next__(self):
        asked = time.time()
        batch = next(self.batches)
        self.notes["asked"].append(asked)
        self.notes["waited"].append(time.time() - asked)
        self.notes["VmRSS"] = resident()  # of the last step but for its end
        return batch

    def close(self):
        self.batches.close()


def child(file, started, *flags):
    """The script as it would run by itself, but for its loader, which is watched; notes go to a JSON file."""
    notes = {"started": float(started), "asked": [], "waited": []}
    quiet = errors.quiet_libraries

    def watch(debug):  # the first thing that the script calls after its checks, before its slow imports
        quiet(debug)
        from lpl_finetuning.training import run

        make = run.batches
        run.batches = lambda *more: Watched(make(*more), notes)

    errors.quiet_libraries = watch
    sys.argv = ["train_sdxl_lpl.py", *flags]
    runpy.run_path(str(ROOT / "train_sdxl_lpl.py"), run_name="__main__")
    notes["VmHWM"] = resident("VmHWM")
    Path(file).write_text(json.dumps(notes))


def train(work, flags, *more):
    """Notes of a run in a process of its own."""
    file = work / "notes.json"
    command = [sys.executable, __file__, "--child", str(file), str(time.time()), *flags, *map(str, more)]
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        sys.exit(f"error: the run failed\n{result.stderr[-3000:]}")
    return json.loads(file.read_text())


def fill_stores(flags):
    """Put random rows into both stores of a run for all that is missing there; the first rows give the shapes."""
    errors.quiet_libraries(False)
    import torch

    import train_sdxl_lpl
    from lpl_finetuning.data.encoding import captions_to_encode, images_to_encode

    args = train_sdxl_lpl.parse_args(flags)
    images = find_images(data_source(args))[0].images
    keys = {
        "prompts": captions_to_encode(caption_rules(args), images, prompts=args.validation_prompt or ()),
        "latents": images_to_encode(images, framing_rules(args).framing(images)),
    }
    for kind, pairs in keys.items():
        [folder] = (cache_folder(args.cache_dir) / kind).iterdir()
        store, names = TensorStore(folder), (key for key, _ in tqdm(pairs, f"filling {kind}", leave=False))
        first = next(names)
        shapes = {name: (value.shape, value.dtype) for name, value in store.get(first).items()}
        while chunk := list(itertools.islice(names, 256)):  # as many as encoding puts into a shard
            rows = {name: torch.rand(len(chunk), *shape).to(dtype) for name, (shape, dtype) in shapes.items()}
            store.put({key: {name: rows[name][at] for name in rows} for at, key in enumerate(chunk)})


@contextlib.contextmanager
def warm_run(count, work):
    """Flags of a run on many pictures of which everything is in the caches; its first scan is timed."""
    pictures = work / f"squares-{count}"
    make_squares(pictures, count)
    flags = [
        "--pretrained_model_name_or_path", str(ROOT / "examples" / "tiny-sdxl"), "--train_data_dir", str(pictures),
        "--cache_dir", str(work / f"cache-{count}"), "--output_dir", str(work / f"out-{count}"), "--resolution", "64",
        "--center_crop", "--train_batch_size", "16",
    ]  # fmt: skip
    started = time.perf_counter()
    scan_folder(pictures, cache_dir=work / f"cache-{count}")
    seconds = time.perf_counter() - started
    train(work, flags, "--max_train_samples", 16, "--max_train_steps", 1)
    fill_stores(flags)
    train(work, flags, "--max_train_steps", 1)  # captions longer than the tokenizers take are counted once, too
    yield flags, seconds


def measure_memory(args, count, work):
    """Row: start and memory of a warm run."""
    steps, runs = args.steps or 40, []
    with warm_run(count, work) as (flags, scan_seconds):
        for _ in range(args.rounds):
            notes = train(work, flags, "--use_lora", "--rank", 4, "--max_train_steps", steps)
            runs.append((notes["asked"][0] - notes["started"], notes["VmRSS"], notes["VmHWM"]))
    seconds, last, peak = (statistics.median(values) for values in zip(*runs, strict=True))
    return [{"part": "memory", "images": count, "first scan s": scan_seconds, "to first step s": min(runs)[0],
             "median s": seconds, "RSS MB": last / MEGABYTE, "peak MB": peak / MEGABYTE}]  # fmt: skip


def measure_loader(args, count, work):
    """Rows: the share of waiting, without workers and with two."""
    steps, rows = args.steps or 100, []
    with warm_run(count, work) as (flags, _):
        for workers in (0, 2):
            runs = []
            for _ in range(args.rounds):
                notes = train(
                    work, flags, "--use_lpl", "--max_train_steps", steps, "--dataloader_num_workers", workers
                )
                first = min(WARM_UP, steps // 2)
                asked, waited = notes["asked"][first:], notes["waited"][first:-1]
                total = asked[-1] - asked[0]
                runs.append((sum(waited) / total, sum(waited) / len(waited), total / len(waited)))
            share, wait, step = min(runs)
            rows.append({"part": "loader", "images": count, "workers": workers, "step ms": 1e3 * step,
                         "waiting ms": 1e3 * wait, "share %": 100 * share, "worst %": 100 * max(runs)[0]})  # fmt: skip
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


def measure_encode(args, count, work):
    """Rows: images a second with and without preparation ahead, in turns."""
    errors.quiet_libraries(False)
    import torch

    import train_sdxl_lpl
    from lpl_finetuning.data.encoding import cut, encode_images, images_to_encode

    pictures = work / "pictures"
    make_photographs(pictures, count)
    flags = ["--pretrained_model_name_or_path", str(ROOT / "examples" / "tiny-sdxl"), "--train_data_dir",
             str(pictures), "--resolution", "64", "--center_crop", "--cache_dir", str(work)]  # fmt: skip
    parsed = train_sdxl_lpl.parse_args(flags)
    images = find_images(data_source(parsed))[0].images
    items = list(images_to_encode(images, framing_rules(parsed).framing(images)))
    vae = train_sdxl_lpl.load_vae(parsed.base_model, torch.float32, torch.device("cpu"))
    encode = functools.partial(encode_images, vae=vae)

    def one_after_the_other(batch):
        return encode([cut(item) for item in batch])

    seconds = {"ahead": [], "in turn": []}
    for number in range(args.rounds):
        for way, values in seconds.items():
            store, started = TensorStore(work / f"{way}-{number}"), time.perf_counter()
            if way == "ahead":
                encode_missing(store, items, encode, 16, "encoding images", prepare=cut, show=False)
            else:
                encode_missing(store, items, one_after_the_other, 16, "encoding images", show=False)
            values.append(time.perf_counter() - started)
    ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
    return [{"part": "encode", "images": count, "opened": way, "images/s": count / min(values),
             "ratio": ratio if way == "ahead" else 1.0} for way, values in seconds.items()]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------


MEASURES = {"scan": measure_scan, "memory": measure_memory, "loader": measure_loader, "encode": measure_encode}


def show(rows):
    """A part's table, with the load of the machine at its end."""
    heads = [head for head in rows[0] if head != "part"]
    print("  ".join(f"{head:>{max(10, len(head))}}" for head in heads))
    for row in rows:
        cells = [f"{row[head]:,.2f}" if isinstance(row[head], float) else f"{row[head]}" for head in heads]
        print("  ".join(f"{cell:>{max(10, len(head))}}" for cell, head in zip(cells, heads, strict=True)), flush=True)


def main(argv=None):
    """Measure, print tables, write the figures."""
    args = parse_args(argv)
    if args.child:
        child(*args.child)
        return
    machine = f"{platform.machine()} CPU, {os.cpu_count()} CPUs"
    print(f"{date.today()}, {machine}")
    figures = []
    for part in args.parts or COUNTS:
        rows = []
        for count in args.counts or COUNTS[part]:
            with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-data-") as work:
                rows += [row | {"load": os.getloadavg()[0]} for row in MEASURES[part](args, count, Path(work))]
        print(f"\n{part}")
        show(rows)
        figures += rows
    if args.output:
        content = {"machine": machine, "date": str(date.today()), "rows": figures}
        Path(args.output).write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

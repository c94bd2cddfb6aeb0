"""The data of a run, as its flags name them: images and held-out images, sizes, captions, and the report on them."""

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_report_utils import build_report
from data_utils import CaptionRules, Framing
from image_utils import DataError, assign_buckets, auto_buckets, parse_buckets
from model_utils import offline_without_hub
from scan_utils import scan_dataset, scan_folder
from table_utils import hold_out, select, sizes_of


def cache_folder(args):
    """Where scans and encodings are kept: `lpl` in --cache_dir, or in the user's cache."""
    return Path(args.cache_dir or os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lpl"


def target_sizes(args):
    """The shapes that images are cut to, ((height, width), ...)."""
    if not args.aspect_ratio_buckets:
        return ((args.resolution, args.resolution),)
    if args.aspect_ratio_buckets == "auto":
        return auto_buckets(args.resolution)
    return parse_buckets(args.aspect_ratio_buckets)


def largest_size(args):
    """The target with the most pixels, (height, width)."""
    return max(target_sizes(args), key=lambda size: size[0] * size[1])


def framing(args, images, held_out=False):
    """How images are cut; held-out ones always in the same way."""
    sizes = target_sizes(args)
    return Framing(
        sizes,
        assign_buckets(sizes_of(images), sizes) if images else np.zeros(0, np.int16),
        center_crop=args.center_crop or held_out,
        random_flip=args.random_flip and not held_out,
        interpolation=args.image_interpolation_mode,
        crops=0 if held_out else args.cache_variants,
    )


def caption_rules(args):
    """What becomes of captions before they are encoded."""
    return CaptionRules(args.trigger_word, args.shuffle_tags, args.keep_tags, args.tag_shuffles)


def find_images(args):
    """(`Scan` of the images to train on, held-out images); a DataError names the file or column that is wrong."""
    columns = {
        "image_column": args.image_column,
        "caption_column": args.caption_column,
        "default_caption": args.instance_prompt,
        "on_bad_image": args.on_bad_image,
        "cache_dir": args.cache_dir,
        "show": int(os.environ.get("RANK", "0")) == 0,
    }
    of_folders = {"caption_from_folder": args.caption_from_folder, "caption_per_line": args.caption_per_line}
    if args.train_data_dir:
        scan = scan_folder(args.train_data_dir, **columns, **of_folders)
    else:
        local = Path(args.dataset_name).is_dir()
        with contextlib.nullcontext() if local else offline_without_hub():
            scan = scan_dataset(
                args.dataset_name, args.dataset_config_name, **columns, max_samples=args.max_train_samples
            )
    images, held_out = scan.images, []
    if args.validation_data_dir:
        held = scan_folder(args.validation_data_dir, flag="--validation_data_dir", **columns, **of_folders)
        remarks = held.warnings + [f"{held.skipped} of the images are left out."] * bool(held.skipped)
        scan = replace(scan, warnings=scan.warnings + [f"--validation_data_dir: {remark}" for remark in remarks])
        held_out = held.images
    elif args.validation_split:
        share = args.validation_split
        wanted = share if share >= 1 else share * len(images)
        images, held_out = hold_out(images, min(wanted, args.max_validation_samples) if wanted >= 1 else share)
    return replace(scan, images=first_of(images, args.max_train_samples)), first_of(
        held_out, args.max_validation_samples
    )


def first_of(images, count):
    """The first images; all of them where count is None."""
    if count is None or len(images) <= count:
        return images
    return select(images, np.arange(count))


def data_report(args, scan, held_out):
    """The report on the data of a run, `data_report_utils.build_report`."""
    sizes = target_sizes(args) if args.aspect_ratio_buckets else None
    return build_report(scan, held_out, args.resolution, sizes, args.train_batch_size)


def check_strict(args, report):
    """Under --strict, everything that the report on the data remarks upon is an error."""
    if args.strict and report["remarks"]:
        raise DataError("--strict: " + "\n  ".join(["the report on the data remarks:", *report["remarks"]]))


def save_report(report, path):
    """Write the report on the data as JSON."""
    Path(path).write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")

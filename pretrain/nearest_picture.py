"""How many captions a tiny pipeline draws: the share of samples whose nearest training picture has their caption.

    python pretrain/nearest_picture.py --pipeline examples/tiny-sd3

Draws random concepts (captions without skin tones), one sample each, and looks for the picture of the whole set that is
nearest in squared error of RGB at 64 px. Only good for pipelines that were trained on these pictures.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from pretrain.emoji_images import concept, load_emoji

SIZE = 64


def parse_args(argv=None):
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="folder of the pipeline")
    parser.add_argument("--work_dir", default="pretrain/work", help="where the pictures are unpacked")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=40)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def nearest(samples, pictures):
    """Indices (B,) of the pictures with the least squared error; both float32 (…, H, W, 3) in [0, 1]."""
    flat = pictures.reshape(len(pictures), -1)
    return np.array([np.square(flat - sample.reshape(-1)).sum(axis=1).argmin() for sample in samples])


def main(argv=None):
    """Draw, compare, print the share and the misses."""
    args = parse_args(argv)
    images, captions = load_emoji(args.work_dir, SIZE)
    pictures, concepts = images.astype(np.float32) / 255, [concept(caption) for caption in captions]
    unique = sorted(set(concepts))
    chosen = np.random.default_rng(args.seed).choice(unique, min(args.count, len(unique)), replace=False).tolist()
    pipeline = DiffusionPipeline.from_pretrained(args.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    misses = []
    for start in tqdm(range(0, len(chosen), args.batch_size)):
        prompts = chosen[start : start + args.batch_size]
        samples = pipeline(
            prompts,
            height=SIZE,
            width=SIZE,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(args.seed + start + row) for row in range(len(prompts))],
            output_type="np",
        ).images
        found = [concepts[index] for index in nearest(samples, pictures)]
        misses += [(said, seen) for said, seen in zip(prompts, found, strict=True) if said != seen]
    hits = len(chosen) - len(misses)
    print(f"{hits} of {len(chosen)} samples are nearest to a picture of their own caption")
    print("others: " + "; ".join(f"{said} (nearest: {seen})" for said, seen in misses))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()

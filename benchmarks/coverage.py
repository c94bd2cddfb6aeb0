"""How often the 95 % intervals of a difference hold 0 where two models are one: python benchmarks/coverage.py

Each case draws features of real pictures, and of two models with one distribution that is not quite the real one. An
interval that is right holds 0 in 95 of 100 cases. The features are synthetic: correlated, cut at 0 as by a ReLU, with
variances over four decades. The defaults are a quarter of the sizes of an evaluation with EfficientNet-Lite2 (1,280
features, 3,202 real pictures, 1,536 generated ones of each model).
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lpl_finetuning.evaluation.distances import DISTANCES
from lpl_finetuning.evaluation.uncertainty import GROUPS, distance_differences


def parse_args(argv=None):
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--features", type=int, default=320)
    parser.add_argument("--real", type=int, default=800, help="real pictures")
    parser.add_argument("--pictures", type=int, default=384, help="pictures of each model")
    parser.add_argument(
        "--common", type=float, default=0.5, help="share of variance that paired pictures have in common"
    )
    parser.add_argument("--groups", type=int, default=GROUPS, help="of the jackknife")
    parser.add_argument("--first_seed", type=int, default=0, help="of the first case; each case adds 1")
    parser.add_argument("--distances", nargs="+", default=list(DISTANCES), choices=DISTANCES)
    return parser.parse_args(argv)


def features(normal, mixing):
    """Features (N, D) of normal numbers: correlated, about half of them 0."""
    return np.maximum(normal @ mixing.T, 0)


def draw(args, seed, mixing, paired):
    """(real, a, b): features of real pictures and of two models."""
    rng = np.random.default_rng(seed)
    share = args.common if paired else 0
    real = features(rng.standard_normal((args.real, args.features)), mixing)
    common, *own = rng.standard_normal((3, args.pictures, args.features))
    models = (np.sqrt(share) * common + np.sqrt(1 - share) * each for each in own)
    return real, *(features(0.95 * each + 0.02, mixing) for each in models)


def main(argv=None):
    """Print the share of intervals that hold 0, and their width against the spread of the differences."""
    args = parse_args(argv)
    mixing = np.random.default_rng(12345).standard_normal((args.features, args.features))
    mixing *= np.logspace(0, -2, args.features) / np.sqrt(args.features)
    for paired in (True, False):
        found, start = {name: [] for name in args.distances}, time.process_time()
        for seed in range(args.first_seed, args.first_seed + args.cases):
            intervals = distance_differences(
                *draw(args, seed, mixing, paired), args.distances, args.groups, paired, seed
            )
            for name, interval in intervals.items():
                found[name].append(interval)
        seconds = (time.process_time() - start) / args.cases
        print(f"{'paired' if paired else 'unpaired'}: {seconds:.1f} s of CPU for a case")
        for name, intervals in found.items():
            held = sum(each.holds_zero for each in intervals)
            reach = np.mean([each.high - each.low for each in intervals]) / 2
            spread = np.std([each.value for each in intervals])
            print(f"  {name:10} {held} of {args.cases} hold 0; half-width {reach / spread:.2f} standard deviations",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

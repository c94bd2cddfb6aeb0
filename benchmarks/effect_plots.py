"""Pictures of the experiment for docs/effect.md, from the files in `benchmarks/results/`.

    python benchmarks/effect_plots.py [--work WORK]

Writes effect-seeds.png, effect-cost.png and effect-arms.png into docs/images/; with the work folder of `effect.py`,
which has the samples, effect-samples.png too.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from benchmarks.effect_arms import BASELINES, BASES, FINALIST, TWINS
from benchmarks.effect_judge import JUDGE
from benchmarks.effect_results import (
    REFERENCES,
    RESULTS,
    ROOT,
    TITLES,
    VERDICT,
    distances_by_length,
    fresh,
    judged,
    read,
    relative_change,
    start_of,
)
from benchmarks.effect_verdict import BAR, CHECK_SEED, ablation_changes, check_changes

IMAGES = ROOT / "docs" / "images"
MARKERS = "osD^vP*X"  # one for each seed


def seeds_picture(path, results=RESULTS):
    """A row for each framework, a column for each reference: the distances of the finalists, a line for each seed.

    The dashed line is where the mean of an arm must lie to reach the bar. Returns whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    finalists = ("none", FINALIST, TWINS[FINALIST])
    found = {base: [row for row in fresh(base, results) if row["arm"] in finalists] for base in BASES}
    found = {base: rows for base, rows in found.items() if rows}
    if not found:
        return False
    figure, axes = plt.subplots(len(found), 2, figsize=(9, 3.1 * len(found)), squeeze=False, layout="constrained")
    for (base, rows), row_of_axes in zip(found.items(), axes, strict=True):
        for reference, axis in zip(REFERENCES, row_of_axes, strict=True):
            draw_runs(axis, rows, reference)
            axis.set_title(f"{TITLES[base]}: to {reference}", fontsize=9)
    axes[0, 0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def draw_runs(axis, rows, reference):
    """The runs of a framework, those of a seed joined by a line.

    Args:
        axis: of Matplotlib.
        rows: of `fresh`.
        reference: of `REFERENCES`.
    """
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for seed in sorted({row["seed"] for row in rows}):
        own = {row["arm"]: row[reference][JUDGE]["frechet"] for row in rows if row["seed"] == seed}
        places = [place for place, arm in enumerate(arms) if arm in own]
        axis.plot(places, [own[arms[place]] for place in places], MARKERS[seed % len(MARKERS)] + "-",
                  color=f"C{seed}", linewidth=0.8, markersize=4, label=f"seed {seed}")  # fmt: skip
    none = [row[reference][JUDGE]["frechet"] for row in rows if row["arm"] == "none"]
    bar = (1 - BAR) * statistics.mean(none)
    axis.axhline(bar, color="gray", linestyle="--", linewidth=0.8)
    axis.annotate(f"bar: {BAR:.0%} below none", (0.99, bar), xycoords=("axes fraction", "data"), fontsize=7,
                  ha="right", va="bottom", color="gray")  # fmt: skip
    axis.set_xticks(range(len(arms)), arms, fontsize=7)
    axis.tick_params(axis="y", labelsize=7)
    axis.set_ylabel("Fréchet distance (Lite2)", fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def cost_picture(path, base="epsilon", results=RESULTS):
    """Distances to the reconstructions over the time of training: *none* of several lengths, arms of 1,000 steps.

    The unit of time is that of 1,000 steps of *none*. Returns whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cost = read(f"effect-cost-{start_of(base)}", results)
    if not cost:
        return False
    runs = {}
    for steps, distances in distances_by_length(base, results).items():
        for (arm, _), distance in distances.items():
            ratio = cost["ratio_to_the_first"].get(arm)
            if ratio and (arm == "none" or steps == VERDICT[0]):
                runs.setdefault(arm, {}).setdefault(ratio * steps / VERDICT[0], []).append(distance)
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for marker, (arm, places) in zip(MARKERS, sorted(runs.items(), key=lambda item: item[0] != "none"), strict=False):
        points = [(time, value) for time, values in sorted(places.items()) for value in values]
        line = [(time, statistics.mean(values)) for time, values in sorted(places.items())]
        [drawn] = axis.plot(*zip(*line, strict=True), "-", linewidth=1)
        axis.plot(*zip(*points, strict=True), marker, color=drawn.get_color(), markersize=4, label=arm)
    axis.set_xlabel("time of training, in that of 1,000 steps of none", fontsize=8)
    axis.set_ylabel("Fréchet distance to the reconstructions (Lite2)", fontsize=8)
    axis.set_title(f"{TITLES[base]}: one point for each seed", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def arms_picture(path, base="epsilon", results=RESULTS):
    """Differences of single arms from *none*, with 95 % intervals: distances on seed 0, the checks, the ablations.

    Returns whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    distance, one_step = "Fréchet distance to the reconstructions (Lite2)", "perceptual distance of one step (Lite2)"
    panels = {(f"{title}: {measure}, against none"): rows for title, measure, rows in (
        ("1,000 steps, seed 0", distance, seed_changes(base, results)),
        (f"Checks, seed {CHECK_SEED}", distance, check_changes(base, results)),
        ("400 steps, seed 0", one_step, named_ablations(base, results))) if rows}  # fmt: skip
    if not panels:
        return False
    heights = [len(rows) + 2 for rows in panels.values()]
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 0.2 * sum(heights)), height_ratios=heights, squeeze=False,
                                layout="constrained")  # fmt: skip
    for (title, rows), axis in zip(panels.items(), axes[:, 0], strict=True):
        for place, (label, (value, low, high)) in enumerate(rows.items()):
            color = "C1" if label in (FINALIST, "as in the verdict") else "C0"
            axis.plot([100 * low, 100 * high], [place] * 2, "-", color=color, linewidth=1.5)
            axis.plot([100 * value], [place], "o", color=color, markersize=4)
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.set_yticks(range(len(rows)), rows, fontsize=7)
        axis.set_ylim(len(rows) - 0.4, -0.6)  # the first one is on top
        axis.tick_params(axis="x", labelsize=7)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("%", fontsize=7, loc="right", labelpad=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def seed_changes(base, results=RESULTS):
    """{arm: [difference, low, high]} of the distances on seed 0 relative to *none*, the lowest first."""
    rows = {row["arm"]: row for row in judged(start_of(base), results) if row["seed"] == 0}
    changes = {arm: relative_change(row, rows["none"]) for arm, row in rows.items() if arm != "none"}
    return dict(sorted(changes.items(), key=lambda item: item[1][0]))


def named_ablations(base, results=RESULTS):
    """`ablation_changes`; an arm that is not compared with *none* says with what."""
    changes = ablation_changes(base, results)
    return {f"{arm} (against {BASELINES[arm]})" if arm in BASELINES else arm: told for arm, told in changes.items()}


def samples_picture(path, work, seed=1, columns=10):
    """Samples of the finalists in each framework, below the training picture of the same caption as the decoder shows
    it.

    The captions are evenly spaced, none is chosen. Returns whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    strips = []
    for base, family in BASES.items():
        folders = {TITLES[base]: work / "reconstructions" / family}
        for arm, told in (("none", "none"), (FINALIST, "with LPL"), (TWINS[FINALIST], "its twin")):
            folders[told] = work / "samples" / "arms" / start_of(base) / f"{arm}-{seed}" / "guidance-1"
        if all(folder.is_dir() for folder in folders.values()):
            names = sorted(file.name for file in folders["none"].glob("*.png"))
            names = [names[int((place + 0.5) * len(names) / columns)] for place in range(columns)]
            strips += [(told, np.concatenate([plt.imread(folder / name)[..., :3] for name in names], axis=1))
                       for told, folder in folders.items()]  # fmt: skip
    if not strips:
        return False
    figure, axes = plt.subplots(len(strips), 1, figsize=(columns, 1.05 * len(strips)))
    figure.subplots_adjust(left=0.1, right=1, top=0.98, bottom=0, hspace=0.22)
    for axis, (told, strip) in zip(axes, strips, strict=True):
        axis.imshow(strip, interpolation="nearest")
        axis.axis("off")
        first = told in TITLES.values()
        axis.text(-12, strip.shape[0] / 2, "pictures" if first else told, ha="right", va="center", fontsize=9)
        if first:
            axis.set_title(told, fontsize=10, loc="left")
    figure.savefig(path, dpi=96)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
    return True


def main():
    """Draw what there are results for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="work folder of effect.py, with the samples")
    args = parser.parse_args()
    if args.work:
        name = IMAGES / "effect-samples.png"
        print(f"wrote {name}" if samples_picture(name, args.work) else f"no samples in {args.work}")
    for draw, name in (
        (seeds_picture, "effect-seeds.png"),
        (cost_picture, "effect-cost.png"),
        (arms_picture, "effect-arms.png"),
    ):
        print(f"wrote {IMAGES / name}" if draw(IMAGES / name) else f"nothing for {name} yet")


if __name__ == "__main__":
    main()

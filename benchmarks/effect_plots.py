"""Pictures of the experiment for docs/effect.md, from the files in `benchmarks/results/`.

    python benchmarks/effect_plots.py

Writes docs/images/effect-seeds.png.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.effect_arms import BASES
from benchmarks.effect_judge import JUDGE
from benchmarks.effect_verdict import BAR, REFERENCES, RESULTS, ROOT, TITLES, judged, start_of

IMAGES = ROOT / "docs" / "images"
MARKERS = "osD^vP*X"  # one for each seed


def seeds_picture(path, results=RESULTS):
    """A row for each framework, a column for each reference: the distance of every run, a line for each seed.

    The dashed line is where the mean of an arm must lie to reach the bar. Returns whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = {base: rows for base in BASES if (rows := judged(start_of(base), results))}
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
        rows: of `judged`.
        reference: of `REFERENCES`.
    """
    counts = {}
    for row in rows:
        counts[row["arm"]] = counts.get(row["arm"], 0) + 1
    arms = [arm for arm in counts if counts[arm] == max(counts.values())]
    arms += [arm for arm in counts if arm not in arms]  # those of a single seed come last
    for seed in sorted({row["seed"] for row in rows}):
        own = {row["arm"]: row[reference][JUDGE]["frechet"] for row in rows if row["seed"] == seed}
        places = [place for place, arm in enumerate(arms) if arm in own]
        axis.plot(places, [own[arms[place]] for place in places], MARKERS[seed % len(MARKERS)] + "-", linewidth=0.8,
                  markersize=4, label=f"seed {seed}")  # fmt: skip
    none = [row[reference][JUDGE]["frechet"] for row in rows if row["arm"] == "none"]
    bar = (1 - BAR) * statistics.mean(none)
    axis.axhline(bar, color="gray", linestyle="--", linewidth=0.8)
    axis.annotate(f"bar: {BAR:.0%} below none", (0.99, bar), xycoords=("axes fraction", "data"), fontsize=7,
                  ha="right", va="bottom", color="gray")  # fmt: skip
    axis.set_xticks(range(len(arms)), arms, fontsize=7, rotation=20 if len(arms) > 4 else 0)
    axis.tick_params(axis="y", labelsize=7)
    axis.set_ylabel("Fréchet distance (Lite2)", fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def main():
    """Draw what there are results for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    path = IMAGES / "effect-seeds.png"
    print(f"wrote {path}" if seeds_picture(path) else "no arm is judged yet")


if __name__ == "__main__":
    main()

"""Tables and the verdict of the experiment, from the files in `benchmarks/results/`.

    python benchmarks/effect_verdict.py

Writes the tables into docs/effect.md, between its marks, and `benchmarks/results/effect.json`. The bar was set before
the arms were trained: in each framework every run with LPL lies below every run without, their mean is at least 6 %
lower, and lower than that of the twin without features.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.effect_arms import BASES, TWINS
from benchmarks.records import put_tables, source

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "effect.md"
JUDGE, OTHER = "efficientnet-lite2", "efficientnet-lite0"
BAR = 0.06  # by which the mean Fréchet distance must be lower
TITLES = {"epsilon": "SDXL, epsilon-prediction", "epsilon-all": "SDXL, epsilon-prediction, all pictures",
          "v_prediction": "SDXL, v-prediction", "flow": "SD3, flow matching"}  # fmt: skip


def read(name, results=RESULTS):
    """A result; None where it is missing."""
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def arm_of(text):
    """(arm, seed) of a model's path, such as arms/epsilon/none-0 or arms/epsilon/gain-0/guidance-1."""
    path = Path(text)
    path = path.parent if path.name.startswith("guidance-") else path
    arm, _, seed = path.name.rpartition("-")
    return arm, int(seed)


def distances_of(found):
    """{model: {network: row}} of a judgement's distances."""
    rows = {}
    for row in found["distances"]:
        rows.setdefault(row["model"], {})[row["network"]] = row
    return rows


def judged(base, results=RESULTS):
    """[{"arm", "seed", NETWORK: Fréchet distance, "kernel", "change": (value, low, high) against the first model}] of
    all judgements of a base's arms at 1,000 steps and guidance 1."""
    rows = []
    for path in sorted(results.glob(f"effect-{base}-*.json")):
        found = json.loads(path.read_text())
        if "distances" not in found or "steps" in path.stem or "guidance" in path.stem:
            continue
        texts = {model["name"]: model["text"] for model in found["models"]}
        changes = {row["b"]: (row["value"], row["low"], row["high"]) for row in found["differences"]
                   if row["metric"] == "frechet" and row["network"] == JUDGE
                   and row["a"] == found["models"][0]["name"]}  # fmt: skip
        for name, networks in distances_of(found).items():
            arm, seed = arm_of(texts[name])
            rows.append({"arm": arm, "seed": seed, "kernel": networks[JUDGE]["kernel"], "change": changes.get(name),
                         **{network: values["frechet"] for network, values in networks.items()}})  # fmt: skip
    return rows


def one_step_of(base, seed, results=RESULTS):
    """{arm: row} of the one-step test at 1,000 steps."""
    found = read(f"effect-one-step-{base}-{seed}", results)
    return {row["model"]: row for row in found["rows"]} if found else {}


def verdict_row(base, results=RESULTS):
    """The row of `effect.json` for a base; None without judged seeds beside 0 that have a baseline and an LPL arm.

    The arm is the one that was judged on most seeds beside *none*, its twin and the scaled estimates.
    """
    rows = [row for row in judged(base, results) if row["seed"] > 0]
    by_arm = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[row["seed"]] = row[JUDGE]
    own = {arm: runs for arm, runs in by_arm.items() if arm not in ("none", "gain", *TWINS.values())}
    if "none" not in by_arm or not own:
        return None
    arm = max(own, key=lambda name: len(own[name]))
    runs, without, twin = own[arm], by_arm["none"], by_arm.get(TWINS.get(arm), {})
    means = [statistics.mean(found.values()) if found else None for found in (runs, without, twin)]
    reached = (max(runs.values()) < min(without.values()) and means[0] <= (1 - BAR) * means[1]
               and means[2] is not None and means[0] < means[2])  # fmt: skip
    one_step = one_step_of(base, 0, results).get(arm, {})
    return {"framework": base, "arm": arm, "seeds": sorted(runs), "fd_mean": means[0], "fd_baseline_mean": means[1],
            "fd_control_mean": means[2], "bar_reached": reached,
            "onestep": {key: value for key, value in one_step.items() if key != "model"}}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def base_table(base, results=RESULTS):
    """Fréchet distances of the base's averages, and the floor."""
    found = read(f"effect-base-{base}", results)
    if not found:
        return ""
    floors = {network["name"]: network["floor"]["frechet"] for network in found["networks"]}
    lines = [f"| {TITLES[base]}: steps | Fréchet distance (Lite2) | kernel (Lite2) | Fréchet distance (Lite0) |",
             "|---|---:|---:|---:|"]  # fmt: skip
    for model, rows in distances_of(found).items():
        lines.append(f"| {int(model):,} | {rows[JUDGE]['frechet']:.1f} | {rows[JUDGE]['kernel']:.4f} | "
                     f"{rows[OTHER]['frechet']:.1f} |")  # fmt: skip
    lines.append(f"| half of the real pictures against the other half | {floors[JUDGE]:.1f} | | {floors[OTHER]:.1f} |")
    return "\n".join([*lines, "", source(found)])


def arm_table(base, results=RESULTS):
    """All arms on seed 0: distances of samples, and the one-step test on held-out pictures."""
    rows = [row for row in judged(base, results) if row["seed"] == 0]
    if not rows:
        return ""
    tests, none = one_step_of(base, 0, results), next(row for row in rows if row["arm"] == "none")
    lines = [f"| {TITLES[base]}: arm | Fréchet (Lite2) | against none | interval | Fréchet (Lite0) | "
             "one step: perceptual (Lite2) | high frequency | gain |",
             "|---|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for row in sorted(rows, key=lambda row: row[JUDGE]):
        test, share = tests.get(row["arm"], {}), row[JUDGE] / none[JUDGE] - 1
        change = f"{row['change'][1]:+.2f} to {row['change'][2]:+.2f}" if row["change"] else ""
        numbers = [f"{test[key]:.4f}" if test else ""
                   for key in (f"perceptual/{JUDGE}", "high_frequency", "gain")]  # fmt: skip
        lines.append(f"| {row['arm']} | {row[JUDGE]:.2f} | {share:+.1%} | {change} | {row[OTHER]:.2f} | "
                     + " | ".join(numbers) + " |")  # fmt: skip
    return "\n".join([*lines, "", source(read(f"effect-{base}-0", results))])


def seeds_table(base, results=RESULTS):
    """The finalists on fresh seeds."""
    rows = [row for row in judged(base, results) if row["seed"] > 0]
    if not rows:
        return ""
    seeds = sorted({row["seed"] for row in rows})
    lines = [f"| {TITLES[base]}: arm | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |",
             "|---|" + "---:|" * (len(seeds) + 1)]  # fmt: skip
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = {row["seed"]: row[JUDGE] for row in rows if row["arm"] == arm}
        cells = [f"{own[seed]:.2f}" if seed in own else "" for seed in seeds]
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {statistics.mean(own.values()):.2f} |")
    return "\n".join(lines)


def ablation_table(base="epsilon", results=RESULTS):
    """Arms of 400 steps by the one-step test."""
    found = read(f"effect-one-step-{base}-0-400-steps", results)
    if not found:
        return ""
    keys = {f"perceptual/{JUDGE}": 4, f"perceptual/{OTHER}": 4, "psnr": 3, "latent_mse": 5, "high_frequency": 4}
    lines = ["| arm of 400 steps | " + " | ".join(keys) + " |", "|---|" + "---:|" * len(keys)]
    for row in found["rows"]:
        cells = []
        for key, decimals in keys.items():
            change = row.get(f"{key}_change")
            told = f" ({change[1]:+.{decimals}f} to {change[2]:+.{decimals}f})" if change else ""
            cells.append(f"{row[key]:.{decimals}f}{told}")
        lines.append(f"| {row['model']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", source(found)])


def decoder_table(name, results=RESULTS):
    """Reconstructions of the decoders of a result."""
    found = read(name, results)
    if not found:
        return ""
    lines = ["| decoder | held-out PSNR, dB | held-out perceptual (Lite2) | Fréchet distance (Lite2) |",
             "|---|---:|---:|---:|"]  # fmt: skip
    for name, row in found["decoders"].items():
        lines.append(f"| {name} | {row['psnr']:.2f} | {row['perceptual']:.4f} | {row['frechet']:.2f} |")
    return "\n".join([*lines, "", source(found)])


def all_tables(results=RESULTS):
    """{mark: Markdown}."""
    tables = {
        "base epsilon-all": base_table("epsilon-all", results),
        "ablations": ablation_table(results=results),
        "reconstructions": decoder_table("effect-reconstructions", results),
        "decoders": decoder_table("effect-autoencoder", results),
    }
    for kind, table in (("base", base_table), ("arms", arm_table), ("seeds", seeds_table)):
        for base in BASES:
            tables[f"{kind} {base}"] = table(base, results)
    return tables


def main():
    """Write the page's tables and `effect.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    PAGE.write_text(put_tables(PAGE.read_text(encoding="utf-8"), all_tables()), encoding="utf-8")
    rows = [row for row in map(verdict_row, BASES) if row]
    if rows:
        (RESULTS / "effect.json").write_text(json.dumps({"verdict": rows}, indent=1) + "\n")
    print(f"wrote {PAGE}; {len(rows)} of {len(BASES)} frameworks have a verdict")


if __name__ == "__main__":
    main()

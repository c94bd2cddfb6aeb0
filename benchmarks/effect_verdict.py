"""Tables and the verdict of the experiment, from the files in `benchmarks/results/`.

    python benchmarks/effect_verdict.py

Writes the tables into docs/effect.md, between its marks, and `benchmarks/results/effect.json`. The bar was set before
the arms were trained: in each framework every run with LPL lies below every run without, their mean is at least 6 %
lower, and lower than that of the twin without features. The bar is asked of both references: the training pictures,
and their reconstructions by the base's autoencoder.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.effect_arms import BASES, FINALIST, STARTS, TWINS
from benchmarks.effect_judge import JUDGE, NETWORKS, SAMPLES, SAMPLING_STEPS
from benchmarks.records import put_tables, source

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "effect.md"
REFERENCES = ("pictures", "reconstructions")
BAR = 0.06  # by which the mean Fréchet distance must be lower
TITLES = {"epsilon": "SDXL, epsilon-prediction", "v_prediction": "SDXL, v-prediction", "flow": "SD3, flow matching",
          "earlier-all": "The earlier base, all pictures", "earlier": "The earlier base"}  # fmt: skip
EARLIER_STARTS = {"earlier-009000": "The earlier base of 9,000 steps",
                  "earlier-015000": "The earlier base of 15,000 steps"}  # fmt: skip
OTHER = NETWORKS[1]
VERDICT = (1000, 1, SAMPLING_STEPS)  # training steps, guidance and sampling steps of the verdict
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # {seeds: 97.5 % quantile of t}


def read(name, results=RESULTS):
    """A result; None where it is missing."""
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def start_of(base):
    """Where the arms of a base's verdict start, such as epsilon-009000."""
    return f"{base}-{STARTS[base]}"


def judged(start, results=RESULTS):
    """[{"arm", "seed", "change": {REFERENCE: [value, low, high]}, REFERENCE: {NETWORK: {"frechet", "kernel"}}}] of all
    judgements of arms under the conditions of the verdict."""
    return judgements(start, results).get(VERDICT, [])


def judgements(start, results=RESULTS):
    """{(training steps, guidance, sampling steps): rows as of `judged`} of all judgements of as many samples as the
    verdict has."""
    rows = {}
    for path in sorted(results.glob(f"effect-judged-{start}-*.json")):
        found = json.loads(path.read_text())
        if found["samples"] != SAMPLES:
            continue
        condition = found["steps"], found["guidance"], found.get("sampling_steps", SAMPLING_STEPS)
        rows.setdefault(condition, []).extend(
            {"arm": row["model"], "seed": found["seed"], **row} for row in found["rows"]
        )
    return rows


def one_step_of(start, seed, results=RESULTS):
    """{arm: row} of the one-step test at 1,000 steps."""
    found = read(f"effect-one-step-{start}-{seed}", results)
    return {row["model"]: row for row in found["rows"]} if found else {}


def verdict_row(base, results=RESULTS):
    """The row of `effect.json` for a base; None without judged seeds beside 0 that have a baseline and the finalist.

    Distances to the training pictures begin with `fd`, those to the reconstructions with `fd_shown`.
    """
    rows = [row for row in judged(start_of(base), results) if row["seed"] > 0]
    seeds = {}
    for row in rows:
        seeds.setdefault(row["arm"], set()).add(row["seed"])
    arm = FINALIST
    if not {"none", arm} <= seeds.keys():
        return None
    result = {"framework": base, "arm": arm, "seeds": sorted(seeds[arm])}
    for reference, key in zip(REFERENCES, ("fd", "fd_shown"), strict=True):
        runs, without, twin = ([row[reference][JUDGE]["frechet"] for row in rows if row["arm"] == name]
                               for name in (arm, "none", TWINS.get(arm)))  # fmt: skip
        means = [statistics.mean(found) if found else None for found in (runs, without, twin)]
        reached = max(runs) < min(without) and means[0] <= (1 - BAR) * means[1] and bool(twin) and means[0] < means[2]
        result |= {f"{key}_mean": means[0], f"{key}_baseline_mean": means[1], f"{key}_control_mean": means[2],
                   f"{key}_bar_reached": reached}  # fmt: skip
    return result | {"onestep": mean_one_step(base, arm, result["seeds"], results)}


def mean_one_step(base, arm, seeds, results=RESULTS):
    """{measure: mean over seeds} of an arm's one-step test, with MEASURE_baseline for *none*; {} without all seeds."""
    tests = [one_step_of(start_of(base), seed, results) for seed in seeds]
    if not all(arm in test and "none" in test for test in tests):
        return {}
    keys = [key for key, value in tests[0][arm].items() if isinstance(value, float)]
    return {f"{key}{ending}": statistics.mean(test[name][key] for test in tests)
            for key in keys for name, ending in ((arm, ""), ("none", "_baseline"))}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def cells_of(row):
    """Fréchet distances of a row to both references by both networks, as cells."""
    return " | ".join(f"{row[reference][network]['frechet']:.2f}" for reference in REFERENCES for network in NETWORKS)


HEADS = "pictures (Lite2) | pictures (Lite0) | reconstructions (Lite2) | reconstructions (Lite0) |"


def base_table(base, results=RESULTS):
    """Fréchet distances of the base's averages, and the floors."""
    found = read(f"effect-judged-base-{base}", results)
    if not found:
        return ""
    lines = [f"| {TITLES[base]}: steps | {HEADS}", "|---|---:|---:|---:|---:|"]
    lines += [f"| {int(row['model']):,} | {cells_of(row)} |" for row in found["rows"]]
    floors = {name: {network: {"frechet": value} for network, value in floor.items()}
              for name, floor in found["floors"].items()}  # fmt: skip
    lines.append(f"| half of the reference against the other half | {cells_of(floors)} |")
    return "\n".join([*lines, "", source(found)])


def earlier_base_table(results=RESULTS):
    """The earlier base on all pictures, judged before reconstructions were a reference."""
    found = read("effect-base-earlier-all", results)
    if not found:
        return ""
    lines = [f"| {TITLES['earlier-all']}: steps | pictures (Lite2) | pictures (Lite0) |", "|---|---:|---:|"]
    values = {}
    for row in found["distances"]:
        values.setdefault(row["model"], {})[row["network"]] = row["frechet"]
    values = {f"{int(model):,}": row for model, row in values.items()}
    values["half of the real pictures against the other half"] = {
        network["name"]: network["floor"]["frechet"] for network in found["networks"]
    }
    lines += [f"| {name} | {row[JUDGE]:.1f} | {row[OTHER]:.1f} |" for name, row in values.items()]
    return "\n".join([*lines, "", source(found)])


def arm_table(start, title, results=RESULTS):
    """All arms on seed 0: distances of samples, and the one-step test on held-out pictures."""
    rows = [row for row in judged(start, results) if row["seed"] == 0]
    if not rows:
        return ""
    tests, none = one_step_of(start, 0, results), next(row for row in rows if row["arm"] == "none")
    lines = [f"| {title}: arm | {HEADS} reconstructions (Lite2), against none | interval | "
             "one step: perceptual (Lite2) | high frequency | gain |",
             "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for row in sorted(rows, key=lambda row: row["reconstructions"][JUDGE]["frechet"]):
        test, shown = tests.get(row["arm"], {}), row["reconstructions"][JUDGE]["frechet"]
        change = row["change"].get("reconstructions")
        change = f"{change[1]:+.2f} to {change[2]:+.2f}" if change else ""
        numbers = [f"{test[key]:.4f}" if test else ""
                   for key in (f"perceptual/{JUDGE}", "high_frequency", "gain")]  # fmt: skip
        share = shown / none["reconstructions"][JUDGE]["frechet"] - 1
        lines.append(f"| {row['arm']} | {cells_of(row)} | {share:+.1%} | {change} | " + " | ".join(numbers) + " |")
    return "\n".join([*lines, "", source(read(f"effect-judged-{start}-0", results))])


def seeds_table(base, results=RESULTS):
    """The finalists on fresh seeds: distances to the pictures / to the reconstructions."""
    rows = [row for row in judged(start_of(base), results) if row["seed"] > 0]
    if not rows:
        return ""
    seeds = sorted({row["seed"] for row in rows})
    lines = [f"| {TITLES[base]}: arm, to pictures / to reconstructions (Lite2) | "
             + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |",
             "|---|" + "---:|" * (len(seeds) + 1)]  # fmt: skip
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = {row["seed"]: [row[reference][JUDGE]["frechet"] for reference in REFERENCES]
               for row in rows if row["arm"] == arm}  # fmt: skip
        means = [statistics.mean(values) for values in zip(*own.values(), strict=True)]
        columns = [*(own.get(seed) for seed in seeds), means if len(own) == len(seeds) else None]
        lines.append(f"| {arm} | " + " | ".join(" / ".join(f"{value:.2f}" for value in pair) if pair else ""
                                                for pair in columns) + " |")  # fmt: skip
    return "\n".join([*lines, "", source(read(f"effect-judged-{start_of(base)}-{seeds[-1]}", results))])


def changes_of(base, results=RESULTS):
    """{arm: {seed: (difference, low, high)}} from *none* of the same seed, relative, to the reconstructions."""
    rows = [row for row in judged(start_of(base), results) if row["seed"] > 0]
    none = {row["seed"]: row["reconstructions"][JUDGE]["frechet"] for row in rows if row["arm"] == "none"}
    own = {}
    for row in rows:
        if row["seed"] in none and "reconstructions" in row["change"]:  # not the baseline
            changes = [value / none[row["seed"]] for value in row["change"]["reconstructions"]]
            own.setdefault(row["arm"], {})[row["seed"]] = changes
    return own


def changes_table(base, results=RESULTS):
    """Relative differences from *none* of the same seed, to the reconstructions, with their 95 % intervals.

    The intervals of single seeds cover the noise of sampling; that of the mean covers training too, by Student's t
    over the seeds' differences.
    """
    own = changes_of(base, results)
    if not own:
        return ""
    seeds = sorted(set().union(*own.values()))
    lines = [f"| {TITLES[base]}: against none, to reconstructions (Lite2) | "
             + " | ".join(f"seed {seed}" for seed in seeds) + " | mean and interval over seeds |",
             "|---|" + "---:|" * (len(seeds) + 1)]  # fmt: skip
    for arm, changes in own.items():
        columns = [percent_of(*changes[seed]) if seed in changes else "" for seed in seeds]
        lines.append(f"| {arm} | " + " | ".join([*columns, mean_of([each[0] for each in changes.values()])]) + " |")
    return "\n".join(lines)


def verdict_table(results=RESULTS):
    """A row for each framework: distances to the reconstructions of *none* and the finalist, and differences."""
    lines = ["| | seeds | none | with LPL | with LPL, against none | its twin on latents, against none | the bar |",
             "|---|---|---:|---:|---:|---:|---|"]  # fmt: skip
    for base in BASES:
        row, changes = verdict_row(base, results), changes_of(base, results)
        if row is None:
            continue
        told = [mean_of([each[0] for each in changes[arm].values()]) if arm in changes else ""
                for arm in (row["arm"], TWINS[row["arm"]])]  # fmt: skip
        reached = "reached" if row["fd_shown_bar_reached"] else "missed"
        lines.append(f"| {TITLES[base]} | {', '.join(map(str, row['seeds']))} | {row['fd_shown_baseline_mean']:.2f} | "
                     f"{row['fd_shown_mean']:.2f} | {' | '.join(told)} | {reached} |")  # fmt: skip
    return "\n".join(lines) if len(lines) > 2 else ""


def mean_of(values):
    """The mean of relative differences with its 95 % interval by Student's t, as a cell; of one value itself."""
    mean = statistics.mean(values)
    if len(values) not in STUDENT:
        return f"{mean:+.1%}"
    half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return percent_of(mean, mean - half, mean + half)


def percent_of(value, low, high):
    """A relative difference with its interval, as a cell."""
    return f"{value:+.1%} ({low:+.1%} to {high:+.1%})"


def distances_by_length(base, results=RESULTS):
    """{training steps: {(arm, seed): Fréchet distance to the reconstructions}} of the fresh seeds, sampled as for the
    verdict."""
    return {steps: {(row["arm"], row["seed"]): row["reconstructions"][JUDGE]["frechet"]
                    for row in rows if row["seed"] > 0}
            for (steps, *others), rows in judgements(start_of(base), results).items()
            if tuple(others) == VERDICT[1:]}  # fmt: skip


def cost_table(base, results=RESULTS):
    """Times of a step, and each arm of 1,000 steps against *none* of as long a training, where both are judged.

    The length is that of the judged *none* of more steps which is nearest, within 5 %, and has the arm's seeds.
    """
    cost = read(f"effect-cost-{start_of(base)}", results)
    if not cost:
        return ""
    found = distances_by_length(base, results)
    lines = [f"| {TITLES[base]}: arm | ms a picture | times none | seeds | reconstructions (Lite2) | steps of none | "
             "none of as long | against it |", "|---|---:|---:|---|---:|---:|---:|---:|"]  # fmt: skip
    for arm, ratio in cost["ratio_to_the_first"].items():
        cells = [arm, f"{1000 * cost['seconds_a_sample'][arm]:.1f}", f"{ratio:.2f}"]
        own = {seed: value for (name, seed), value in found.get(VERDICT[0], {}).items() if name == arm}
        lengths = {abs(steps / VERDICT[0] / ratio - 1): steps for steps, values in found.items()
                   if steps > VERDICT[0] and all(("none", seed) in values for seed in own)}  # fmt: skip
        if own and min(lengths, default=1) <= 0.05:
            steps = lengths[min(lengths)]
            none = {seed: found[steps]["none", seed] for seed in own}
            cells += [", ".join(map(str, sorted(own))), f"{statistics.mean(own.values()):.2f}", f"{steps:,}",
                      f"{statistics.mean(none.values()):.2f}",
                      mean_of([value / none[seed] - 1 for seed, value in own.items()])]  # fmt: skip
        lines.append(f"| {' | '.join(cells + [''] * (8 - len(cells)))} |")
    return "\n".join([*lines, "", source(cost)])


def conditions_table(base, results=RESULTS):
    """Means over the fresh seeds, under the verdict's conditions and others, against *none* of the same seeds."""
    found = {condition: [row for row in rows if row["seed"] > 0]
             for condition, rows in judgements(start_of(base), results).items()}  # fmt: skip
    if len(found) < 2 or VERDICT not in found:
        return ""
    lines = [f"| {TITLES[base]}: training steps | guidance | sampling steps | arm | seeds | pictures (Lite2) | "
             "reconstructions (Lite2) | against none |", "|---:|---:|---:|---|---|---:|---:|---:|"]  # fmt: skip
    for condition in sorted(found):
        for arm in dict.fromkeys(row["arm"] for row in found[condition]):
            own = {row["seed"]: row for row in found[condition] if row["arm"] == arm}
            none = {row["seed"]: row for row in found[condition] if row["arm"] == "none"}
            means = [statistics.mean(row[reference][JUDGE]["frechet"] for row in own.values())
                     for reference in REFERENCES]  # fmt: skip
            change = ""
            if arm != "none" and own.keys() <= none.keys():
                before = statistics.mean(none[seed]["reconstructions"][JUDGE]["frechet"] for seed in own)
                change = f"{means[1] / before - 1:+.1%}"
            steps, guidance, sampling = condition
            lines.append(f"| {steps:,} | {guidance:g} | {sampling} | {arm} | {', '.join(map(str, sorted(own)))} | "
                         f"{means[0]:.2f} | {means[1]:.2f} | {change} |")  # fmt: skip
    return "\n".join(lines)


def one_step_table(base, results=RESULTS):
    """The one-step test of the finalists: means over the fresh seeds that have it."""
    tests = {seed: found for seed in range(1, 10) if (found := one_step_of(start_of(base), seed, results))}
    if not tests:
        return ""
    decimals = {f"perceptual/{JUDGE}": 4, f"perceptual/{OTHER}": 4, "psnr": 2, "latent_mse": 4, "high_frequency": 3,
                "gain": 3}  # fmt: skip
    lines = [f"| {TITLES[base]}: arm, mean of seeds {', '.join(map(str, tests))} | perceptual (Lite2) "
             "| perceptual (Lite0) | PSNR, dB | error of latents | high frequencies | gain |",
             "|---|" + "---:|" * len(decimals)]  # fmt: skip
    for arm in next(iter(tests.values())):
        if not all(arm in test for test in tests.values()):
            continue
        rows = [test[arm] for test in tests.values()]
        means = [f"{statistics.mean(row[key] for row in rows):.{count}f}" for key, count in decimals.items()]
        lines.append(f"| {arm} | " + " | ".join(means) + " |")
    return "\n".join([*lines, "", source(read(f"effect-one-step-{start_of(base)}-{max(tests)}", results))])


def ablation_table(base="epsilon", results=RESULTS):
    """Arms of 400 steps by the one-step test."""
    found = read(f"effect-one-step-{start_of(base)}-0-400-steps", results)
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
        "verdict": verdict_table(results),
        "base earlier-all": earlier_base_table(results),
        "base earlier": base_table("earlier", results),
        "ablations": ablation_table(results=results),
        "reconstructions": decoder_table("effect-reconstructions", results),
        "decoders": decoder_table("effect-autoencoder", results),
    }
    for base in BASES:
        tables[f"base {base}"] = base_table(base, results)
        tables[f"arms {base}"] = arm_table(start_of(base), TITLES[base], results)
        tables[f"seeds {base}"] = seeds_table(base, results)
        tables[f"changes {base}"] = changes_table(base, results)
        tables[f"cost {base}"] = cost_table(base, results)
        tables[f"one-step {base}"] = one_step_table(base, results)
        tables[f"conditions {base}"] = conditions_table(base, results)
    return tables | {f"arms {start}": arm_table(start, title, results) for start, title in EARLIER_STARTS.items()}


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

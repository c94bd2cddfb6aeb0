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

from benchmarks.effect_arms import ABLATIONS, ALL, BASELINES, BASES, FINALIST, TWINS, options_of
from benchmarks.effect_judge import JUDGE, NETWORKS
from benchmarks.effect_results import (
    REFERENCES,
    RESULTS,
    ROOT,
    TITLES,
    VERDICT,
    changes_of,
    combined,
    distances_by_length,
    frechet,
    fresh,
    interpolated,
    judged,
    judgements,
    one_step_of,
    over_seeds,
    read,
    relative_change,
    start_of,
)
from benchmarks.records import put_tables, source

PAGE = ROOT / "docs" / "effect.md"
BAR = 0.06  # by which the mean Fréchet distance must be lower
EARLIER_STARTS = {"earlier-009000": "The earlier base of 9,000 steps",
                  "earlier-015000": "The earlier base of 15,000 steps"}  # fmt: skip
OTHER = NETWORKS[1]
CHECK_SEED = 1
CHECKS = {  # {what is changed: (condition, arm)}
    "as in the verdict": (VERDICT, FINALIST),
    "a share of 0.05": (VERDICT, f"{FINALIST}-share-0.05"),
    "a share of 0.4": (VERDICT, f"{FINALIST}-share-0.4"),
    "sigma / alpha up to 1": (VERDICT, f"{FINALIST}-gate-1"),
    "guidance 3": ((VERDICT[0], 3, VERDICT[2]), FINALIST),
    "3,000 steps": ((3 * VERDICT[0], *VERDICT[1:]), FINALIST),
}
REACHED = {(False, False): "missed", (True, False): "reached to pictures only",
           (False, True): "reached to reconstructions only", (True, True): "reached"}  # fmt: skip


def verdict_row(base, results=RESULTS):
    """The row of `effect.json` for a base; None without judged seeds beside 0 that have a baseline and the finalist.

    Distances to the training pictures begin with `fd`, those to the reconstructions with `fd_shown`.
    """
    rows, seeds = fresh(base, results), {}
    for row in rows:
        seeds.setdefault(row["arm"], set()).add(row["seed"])
    arm = FINALIST
    if not {"none", arm} <= seeds.keys():
        return None
    result = {"framework": base, "arm": arm, "seeds": sorted(seeds[arm])}
    for reference, key in zip(REFERENCES, ("fd", "fd_shown"), strict=True):
        runs, without, twin = ([frechet(row, reference) for row in rows if row["arm"] == name]
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
    lines = [f"| {title}: arm | {HEADS} reconstructions (Lite2), against none | against {FINALIST} | "
             "one step: perceptual (Lite2) | high frequencies | contrast |",
             "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for row in sorted(rows, key=frechet):
        test = tests.get(row["arm"], {})
        told = [percent_of(*relative_change(row, none, kind=kind)) if "reconstructions" in row.get(kind, {}) else ""
                for kind in ("change", "finalist_change")]  # fmt: skip
        numbers = [f"{test[key]:.4f}" if test else ""
                   for key in (f"perceptual/{JUDGE}", "high_frequency", "gain")]  # fmt: skip
        lines.append(f"| {row['arm']} | {cells_of(row)} | {' | '.join(told + numbers)} |")
    return "\n".join([*lines, "", source(read(f"effect-judged-{start}-0", results))])


def seeds_table(base, results=RESULTS):
    """The finalists on fresh seeds: distances to the pictures / to the reconstructions."""
    rows = fresh(base, results)
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
    return "\n".join([*lines, "", sources(rows, results)])


def changes_table(base, results=RESULTS, kind="change"):
    """Differences from *none* of the same seed, or from the finalist, relative to *none*, with their 95 % intervals.

    They are of distances to the reconstructions. kind: as for `effect_results.changes_of`.

    Those of single seeds cover sampling; that of the mean covers training too, see `effect_results.combined`.
    """
    own, other = changes_of(base, results, kind), {"change": "none", "finalist_change": FINALIST}[kind]
    if kind != "change":
        own.pop("none", None)
    if not own:
        return ""
    seeds = sorted(set().union(*own.values()))
    lines = [f"| {TITLES[base]}: against {other}, to reconstructions (Lite2) | "
             + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |",
             "|---|" + "---:|" * (len(seeds) + 1)]  # fmt: skip
    for arm, changes in own.items():
        columns = [percent_of(*changes[seed]) if seed in changes else "" for seed in seeds]
        lines.append(f"| {arm} | " + " | ".join([*columns, percent_of(*combined(changes.values()))]) + " |")
    return "\n".join(lines)


def verdict_table(results=RESULTS):
    """A row for each framework: distances to the reconstructions of *none* and the finalist, and differences."""
    lines = ["| | seeds | none | with LPL | with LPL, against none | its twin, against none | with LPL, against its "
             "twin | with LPL, against none, to the pictures | the bar |",
             "|---|---|---:|---:|---:|---:|---:|---:|---|"]  # fmt: skip
    for base in BASES:
        row = verdict_row(base, results)
        if row is None:
            continue
        arm, wanted = row["arm"], {}
        for column, (name, kind, reference) in enumerate(
            [(arm, "change", "reconstructions"), (TWINS[arm], "change", "reconstructions"),
             (arm, "twin_change", "reconstructions"), (arm, "change", "pictures")]
        ):  # fmt: skip
            found = changes_of(base, results, kind, reference).get(name)
            wanted[column] = percent_of(*combined(found.values())) if found else ""
        reached = REACHED[row["fd_bar_reached"], row["fd_shown_bar_reached"]]
        lines.append(f"| {TITLES[base]} | {', '.join(map(str, row['seeds']))} | {row['fd_shown_baseline_mean']:.2f} | "
                     f"{row['fd_shown_mean']:.2f} | {' | '.join(wanted.values())} | {reached} |")  # fmt: skip
    return "\n".join(lines) if len(lines) > 2 else ""


def percent_of(value, low, high):
    """A relative difference with its interval, as a cell."""
    return f"{value:+.1%} ({low:+.1%} to {high:+.1%})"


def cost_table(base, results=RESULTS):
    """Times of a step, and each arm of 1,000 steps against *none* of as long a training.

    *None* is judged after several numbers of steps; between them its distance is interpolated, for each seed alone. Up
    to 5 % beyond the longest run, that run stands in.
    """
    cost = read(f"effect-cost-{start_of(base)}", results)
    if not cost:
        return ""
    found = distances_by_length(base, results)
    lines = [f"| {TITLES[base]}: arm | ms a picture | times none | seeds | reconstructions (Lite2) | none of as long "
             "| against it | as near as none after |", "|---|---:|---:|---|---:|---:|---:|---:|"]  # fmt: skip
    for arm, ratio in cost["ratio_to_the_first"].items():
        cells = [arm, f"{1000 * cost['seconds_a_sample'][arm]:.1f}", f"{ratio:.2f}"]
        own = {seed: value for (name, seed), value in found.get(VERDICT[0], {}).items() if name == arm}
        of_none = {seed: sorted((steps, values["none", seed]) for steps, values in found.items()
                                if ("none", seed) in values) for seed in own}  # fmt: skip
        same_time = {}
        for seed, points in of_none.items():
            steps, longest = ratio * VERDICT[0], points[-1][0] if points else 0
            same_time[seed] = interpolated(points, min(steps, longest) if steps <= 1.05 * longest else steps)
        same_place = [interpolated(sorted((value, steps) for steps, value in points), own[seed])
                      for seed, points in of_none.items()]  # fmt: skip
        if arm != "none" and own and None not in same_time.values():
            cells += [", ".join(map(str, sorted(own))), f"{statistics.mean(own.values()):.2f}",
                      f"{statistics.mean(same_time.values()):.2f}",
                      percent_of(*over_seeds([value / same_time[seed] - 1 for seed, value in own.items()])),
                      f"{statistics.mean(same_place):,.0f} steps" if None not in same_place else ""]  # fmt: skip
        lines.append(f"| {' | '.join(cells + [''] * (8 - len(cells)))} |")
    return "\n".join([*lines, "", source(cost)])


def conditions_table(base, results=RESULTS):
    """Means over the fresh seeds under other conditions than the verdict's, against *none* of the same seeds."""
    found = {condition: own for condition, rows in judgements(start_of(base), results).items()
             if condition != VERDICT and (own := [row for row in rows if row["seed"] > 0])}  # fmt: skip
    lines = [f"| {TITLES[base]}: training steps | guidance | sampling steps | arm | seeds | pictures (Lite2) | "
             "reconstructions (Lite2) | against none |", "|---:|---:|---:|---|---|---:|---:|---:|"]  # fmt: skip
    for condition in sorted(found):
        for arm in dict.fromkeys(row["arm"] for row in found[condition]):
            own = {row["seed"]: row for row in found[condition] if row["arm"] == arm}
            none = {row["seed"]: row for row in found[condition] if row["arm"] == "none"}
            means = [statistics.mean(frechet(row, reference) for row in own.values()) for reference in REFERENCES]
            change = ""
            if arm != "none" and own.keys() <= none.keys():
                change = percent_of(*combined([relative_change(row, none[seed]) for seed, row in own.items()]))
            steps, guidance, sampling = condition
            lines.append(f"| {steps:,} | {guidance:g} | {sampling} | {arm} | {', '.join(map(str, sorted(own)))} | "
                         f"{means[0]:.2f} | {means[1]:.2f} | {change} |")  # fmt: skip
    every = [row for condition in sorted(found) for row in found[condition]]
    return "\n".join([*lines, "", sources(every, results)]) if every else ""


def copies_table(base, results=RESULTS):
    """Kernel distances to training and held-out pictures, and how near samples are to the nearest training picture.

    Means over the seeds; the arms of other lengths come last.
    """
    start, tests = start_of(base), {}
    for path in sorted(results.glob(f"effect-copies-{start}-*.json")):
        found = json.loads(path.read_text())
        for row in found["rows"]:
            tests.setdefault((found["steps"], row["model"]), {})[found["seed"]] = row
    if not tests:
        return ""
    rows = {(steps, row["arm"], row["seed"]): row for (steps, *others), rows in judgements(start, results).items()
            if tuple(others) == VERDICT[1:] for row in rows}  # fmt: skip
    lines = [f"| {TITLES[base]}: arm | seeds | to training pictures | against none | to held-out pictures | "
             "against none | nearest training picture | of held-out pictures |",
             "|---|---|" + "---:|" * 6]  # fmt: skip
    for (steps, arm), by_seed in sorted(tests.items(), key=lambda item: item[0][0] != VERDICT[0]):
        judged_rows = [rows[steps, arm, seed] for seed in by_seed]
        train = [row["reconstructions"][JUDGE]["kernel"] for row in judged_rows]
        train_changes = [row.get("kernel_change", {}).get("reconstructions") for row in judged_rows]
        hidden, hidden_changes = ([row.get(key) for row in by_seed.values()] for key in ("kernel", "kernel_change"))
        cells = [arm + (f", {steps:,} steps" if steps != VERDICT[0] else ""), ", ".join(map(str, by_seed))]
        for values, changes in ((train, train_changes), (hidden, hidden_changes)):
            told = [f"{1000 * value:+.3f}" for value in combined(changes)] if None not in changes else []
            cells += [f"{1000 * statistics.mean(values):.3f}", f"{told[0]} ({told[1]} to {told[2]})" if told else ""]
        cells += [f"{statistics.mean(row[key] for row in by_seed.values()):.2f}" for key in ("generated", "held_out")]
        lines.append(f"| {' | '.join(cells)} |")
    last = max(seed for by_seed in tests.values() for seed in by_seed)
    return "\n".join([*lines, "", source(read(f"effect-copies-{start}-{last}", results))])


def gradient_ratios(found):
    """The gradient norms of the weighted perceptual term divided by those of the diffusion loss, of an arm's run."""
    return [at["gradient/lpl"] / at["gradient/diffusion"] for at in found["gradient_norms"].values()
            if at.get("gradient/lpl")]  # fmt: skip


def gradients_table(base, results=RESULTS):
    """The gradient norm of the weighted term, divided by that of the diffusion loss, at five steps of a fresh seed."""
    ratios, prefix = {}, f"effect-arm-{start_of(base)}-"
    for path in sorted(results.glob(f"{prefix}*.json")):
        found = json.loads(path.read_text())
        if found["seed"] and found["steps"] == VERDICT[0]:
            own = gradient_ratios(found)
            if own:
                ratios.setdefault(found["arm"], {})[found["seed"]] = own
    lines = [f"| {TITLES[base]}: arm | seeds | median | least | most |", "|---|---|---:|---:|---:|"]
    for arm, by_seed in ratios.items():
        every = [ratio for own in by_seed.values() for ratio in own]
        lines.append(f"| {arm} | {', '.join(map(str, sorted(by_seed)))} | {statistics.median(every):.2f} | "
                     f"{min(every):.2f} | {max(every):.2f} |")  # fmt: skip
    return "\n".join(lines) if ratios else ""


def one_step_table(base, results=RESULTS):
    """The one-step test of the finalists: means over the fresh seeds that have it."""
    tests = {seed: found for seed in range(1, 10) if (found := one_step_of(start_of(base), seed, results))}
    if not tests:
        return ""
    perceptual = f"perceptual/{JUDGE}"
    decimals = {perceptual: 4, f"perceptual/{OTHER}": 4, "psnr": 2, "latent_mse": 4, "high_frequency": 3, "gain": 3}
    lines = [f"| {TITLES[base]}: arm, mean of seeds {', '.join(map(str, tests))} | perceptual (Lite2) "
             "| perceptual (Lite0) | PSNR, dB | error of latents | high frequencies | contrast | perceptual (Lite2), "
             "against none | error of latents, against none |",
             "|---|" + "---:|" * (len(decimals) + 2)]  # fmt: skip
    for arm in next(iter(tests.values())):
        if not all(arm in test for test in tests.values()):
            continue
        rows = [test[arm] for test in tests.values()]
        cells = [f"{statistics.mean(row[key] for row in rows):.{count}f}" for key, count in decimals.items()]
        for key in (perceptual, "latent_mse"):
            changes = [[value / test["none"][key] for value in test[arm][f"{key}_change"]]
                       for test in tests.values() if f"{key}_change" in test[arm]]  # fmt: skip
            cells.append(percent_of(*combined(changes)) if changes else "")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", source(read(f"effect-one-step-{start_of(base)}-{max(tests)}", results))])


def ablation_changes(base="epsilon", results=RESULTS, against="change"):
    """{arm of 400 steps: [difference, low, high]} of the one-step test's perceptual distance, relative to the other.

    against: "change", from *none* or from the LoRA without LPL; "finalist_change", from the finalist.
    """
    found = read(f"effect-one-step-{start_of(base)}-0-400-steps", results)
    rows, key = {row["model"]: row for row in found["rows"]} if found else {}, f"perceptual/{JUDGE}"
    others = {name: BASELINES.get(name, "none") if against == "change" else FINALIST for name in rows}
    return {name: [value / rows[others[name]][key] for value in row[f"{key}_{against}"]]
            for name, row in rows.items() if f"{key}_{against}" in row}  # fmt: skip


def ablation_table(base="epsilon", results=RESULTS):
    """Arms of 400 steps by the one-step test, with the flags that the finalist lacks."""
    start, keys = start_of(base), ("latent_mse", "high_frequency", "gain")
    found = read(f"effect-one-step-{start}-0-400-steps", results)
    if not found:
        return ""
    changes = [ablation_changes(base, results, against) for against in ("change", "finalist_change")]
    own = options_of(ALL[FINALIST].words(BASES[base], found["steps"]))
    lines = [f"| arm of 400 steps | perceptual (Lite2) | against none | against {FINALIST} | error of latents | high "
             "frequencies | contrast | gradient |", "|---|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for row in found["rows"]:
        name = row["model"]
        told = [percent_of(*of_kind[name]) if name in of_kind else "" for of_kind in changes]
        options = options_of(ALL[name].words(BASES[base], found["steps"]))
        differs = [f"{flag} {' '.join(values)}".strip() for flag, values in options.items() if values != own.get(flag)]
        label = f"{name} (`{' '.join(differs)}`)" if differs and name in ABLATIONS else name
        run = read(f"effect-arm-{start}-{name}-0-400-steps", results)
        ratios = gradient_ratios(run) if run else []
        cells = [label, f"{row[f'perceptual/{JUDGE}']:.4f}", *told, *(f"{row[key]:.4f}" for key in keys),
                 f"{statistics.median(ratios):.2f}" if ratios else ""]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", source(found)])


def check_rows(base="epsilon", results=RESULTS):
    """{check: (the row of *none*, the row with LPL)} of what was judged, under the same conditions."""
    found = {(condition, row["arm"]): row for condition, rows in judgements(start_of(base), results).items()
             for row in rows if row["seed"] == CHECK_SEED}  # fmt: skip
    pairs = {label: (found.get((condition, "none")), found.get((condition, arm)))
             for label, (condition, arm) in CHECKS.items()}  # fmt: skip
    return {label: pair for label, pair in pairs.items() if None not in pair}


def check_changes(base="epsilon", results=RESULTS, reference="reconstructions"):
    """{check: [difference, low, high]} of the distances, relative to *none* under the same conditions."""
    return {label: relative_change(row, none, reference) for label, (none, row) in check_rows(base, results).items()}


def checks_table(base="epsilon", results=RESULTS):
    """What the plan asks for where the bar is missed: the finalist with one thing changed, on one fresh seed."""
    lines = [
        f"| {TITLES[base]}, seed {CHECK_SEED} | none | with LPL | against none | against none, to the pictures |",
        "|---|---:|---:|---:|---:|",
    ]
    shown, pictures = check_changes(base, results), check_changes(base, results, "pictures")
    rows = check_rows(base, results)
    for label, (none, row) in rows.items():
        lines.append(f"| {label} | {frechet(none):.2f} | {frechet(row):.2f} | {percent_of(*shown[label])} | "
                     f"{percent_of(*pictures[label])} |")  # fmt: skip
    return "\n".join([*lines, "", sources([row for _, row in rows.values()], results)]) if len(lines) > 3 else ""


def sources(rows, results=RESULTS):
    """Paragraphs with the commands of all results that rows of `judgements` come from."""
    return "\n\n".join(dict.fromkeys(source(read(row["result"], results)) for row in rows))


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
        "finalist": changes_table("epsilon", results, "finalist_change"),
        "checks": checks_table(results=results),
        "ablations": ablation_table(results=results),
        "reconstructions": decoder_table("effect-reconstructions", results),
        "decoders": decoder_table("effect-autoencoder", results),
    }
    for base in BASES:
        tables[f"base {base}"] = base_table(base, results)
        tables[f"arms {base}"] = arm_table(start_of(base), TITLES[base], results)
        tables[f"seeds {base}"] = seeds_table(base, results)
        tables[f"changes {base}"] = changes_table(base, results)
        tables[f"copies {base}"] = copies_table(base, results)
        tables[f"gradients {base}"] = gradients_table(base, results)
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

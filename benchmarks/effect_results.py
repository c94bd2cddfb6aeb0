"""The results of the experiment on LPL's effect, read from `benchmarks/results/`, and intervals over seeds."""

import itertools
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.effect_arms import STARTS
from benchmarks.effect_judge import JUDGE, SAMPLES, SAMPLING_STEPS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
REFERENCES = ("pictures", "reconstructions")
TITLES = {"epsilon": "SDXL, epsilon-prediction", "v_prediction": "SDXL, v-prediction", "flow": "SD3, flow matching",
          "earlier-all": "The earlier base, all pictures", "earlier": "The earlier base"}  # fmt: skip
VERDICT = (1000, 1, SAMPLING_STEPS)  # training steps, guidance and sampling steps of the verdict
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # {seeds: 97.5 % quantile of t}


def read(name, results=RESULTS):
    """A result; None where it is missing."""
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def start_of(base):
    """Where the arms of a base's verdict start, such as epsilon-009000."""
    return f"{base}-{STARTS[base]}"


def judgements(start, results=RESULTS):
    """{(training steps, guidance, sampling steps): rows} of all judgements of as many samples as the verdict has.

    A row is {"arm", "seed", "result": its file's stem, REFERENCE: {NETWORK: {"frechet", "kernel"}},
    "change": {REFERENCE: [value, low, high]}, ...}, see `effect_judge.judge`.
    """
    rows = {}
    for path in sorted(results.glob(f"effect-judged-{start}-*.json")):
        found = json.loads(path.read_text())
        if found["samples"] != SAMPLES:
            continue
        condition = found["steps"], found["guidance"], found.get("sampling_steps", SAMPLING_STEPS)
        rows.setdefault(condition, []).extend(
            {"arm": row["model"], "seed": found["seed"], "result": path.stem, **row} for row in found["rows"]
        )
    return rows


def judged(start, results=RESULTS):
    """Rows as of `judgements` under the conditions of the verdict."""
    return judgements(start, results).get(VERDICT, [])


def fresh(base, results=RESULTS):
    """The same of the seeds that did not choose an arm."""
    return [row for row in judged(start_of(base), results) if row["seed"] > 0]


def frechet(row, reference="reconstructions"):
    """The distance that the verdict is about, of a row."""
    return row[reference][JUDGE]["frechet"]


def one_step_of(start, seed, results=RESULTS):
    """{arm: row} of the one-step test at 1,000 steps."""
    return {row["model"]: row for row in (read(f"effect-one-step-{start}-{seed}", results) or {"rows": []})["rows"]}


def relative_change(row, none, reference="reconstructions", kind="change"):
    """[difference, low, high] of a row of `judgements`, relative to the row of *none*. kind: as for `changes_of`."""
    return [value / frechet(none, reference) for value in row[kind][reference]]


def changes_of(base, results=RESULTS, kind="change", reference="reconstructions"):
    """{arm: {seed: [difference, low, high]}} of Fréchet distances, relative to *none* of the same seed.

    kind: "change", from *none*; "twin_change", from the arm's twin; "finalist_change", from the finalist.
    """
    rows = fresh(base, results)
    none, own = {row["seed"]: row for row in rows if row["arm"] == "none"}, {}
    for row in rows:
        if row["seed"] in none and reference in row.get(kind, {}):
            change = relative_change(row, none[row["seed"]], reference, kind)
            own.setdefault(row["arm"], {})[row["seed"]] = change
    return own


def distances_by_length(base, results=RESULTS):
    """{training steps: {(arm, seed): Fréchet distance to the reconstructions}} of the fresh seeds, sampled as for the
    verdict."""
    return {steps: {(row["arm"], row["seed"]): frechet(row) for row in rows if row["seed"] > 0}
            for (steps, *others), rows in judgements(start_of(base), results).items()
            if tuple(others) == VERDICT[1:]}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def over_seeds(values):
    """(mean, low, high) of a number of each seed, 95 % by Student's t; the number itself of a single seed."""
    mean = statistics.mean(values)
    half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) in STUDENT else 0.0
    return mean, mean - half, mean + half


def combined(intervals):
    """(mean, low, high) of [value, low, high] of each seed, which covers training and sampling.

    All seeds are sampled with the same noise, so their spread shows training alone. The width that sampling gives to
    one seed is added in quadrature: as if it were the same for all of them.
    """
    mean, low, _ = over_seeds([value for value, _, _ in intervals])
    half = ((mean - low) ** 2 + statistics.mean((high - low) / 2 for _, low, high in intervals) ** 2) ** 0.5
    return mean, mean - half, mean + half


def interpolated(points, x):
    """The value at x on the straight lines through points, [(x, value)] in the order of x; None outside of them."""
    for (left, before), (right, after) in itertools.pairwise(points):
        if left <= x <= right:
            return before + (after - before) * (x - left) / (right - left)
    return None

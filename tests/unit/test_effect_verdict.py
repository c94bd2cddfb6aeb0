"""The experiment's verdict: what the files say is what the page and `effect.json` say."""

import json
import subprocess

import numpy as np
import pytest
from PIL import Image

from benchmarks import effect_results, effect_verdict, records
from benchmarks.effect_judge import JUDGE
from benchmarks.records import put_tables
from tests.runs import ROOT


def judgement(folder, seed, distances, changes=None, start="epsilon-009000", others=None, **about):
    """A result as `effect.py judge` writes it.

    distances: {arm: Fréchet distance to the pictures by Lite2}; that to the reconstructions is a tenth of it, or the
    second of two numbers; those by Lite0 are greater by 5. others: {arm: more differences}.
    """

    def row(arm, value):
        pair = value if isinstance(value, list) else [value, value / 10]
        both = dict(zip(("pictures", "reconstructions"), pair, strict=True))
        measured = {reference: {"efficientnet-lite2": {"frechet": number, "kernel": number / 1e4},
                                "efficientnet-lite0": {"frechet": number + 5, "kernel": number / 1e4}}
                    for reference, number in both.items()}  # fmt: skip
        return {"model": arm, "change": (changes or {}).get(arm, {}), **measured, **(others or {}).get(arm, {})}

    content = {"command": "python x", "commit": "0123456789", "device": "CPU", "date": "2026-11-28", "seed": seed,
               "steps": 1000, "guidance": 1, "samples": 1536} | about  # fmt: skip
    content["rows"] = [row(*item) for item in distances.items()]
    name = "-".join(["effect-judged", start, str(seed), *map(str, about.values())])
    (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("runs", "twin", "reached"), [
    ([90.0, 91.0, 92.0], 99.0, True),
    ([90.0, 91.0, 99.5], 99.0, False),  # one run above the best run without
    ([95.0, 95.0, 95.0], 99.0, False),  # 5 %
    ([90.0, 91.0, 92.0], 91.0, False),  # the twin does as well
])  # fmt: skip
def test_the_bar(runs, twin, reached, tmp_path):
    for seed, value in enumerate(runs, 1):
        others = {"classifier": 1.0, "gain": 97.0}  # are no finalists
        judgement(tmp_path, seed, {**others, "none": 98.0 + seed, "decoder-full": value, "latent-full": twin})
        judgement(tmp_path, seed, {"none": 1.0, "decoder-full": 200.0}, guidance=3)
        judgement(tmp_path, seed, {"none": 1.0, "decoder-full": 200.0}, start="epsilon-015000")
    row = effect_verdict.verdict_row("epsilon", tmp_path)
    assert row["arm"] == "decoder-full" and row["seeds"] == [1, 2, 3] and row["fd_bar_reached"] is reached
    assert row["fd_mean"] == pytest.approx(sum(runs) / 3) and row["fd_baseline_mean"] == pytest.approx(100)
    assert row["fd_control_mean"] == pytest.approx(twin) and row["fd_shown_bar_reached"] is reached
    assert row["fd_shown_mean"] == pytest.approx(sum(runs) / 30) and row["fd_shown_control_mean"] == twin / 10
    assert effect_verdict.verdict_row("flow", tmp_path) is None


def test_tables_have_what_the_files_have(tmp_path):
    change = {"decoder": {"pictures": [-3, -9, 9], "reconstructions": [-0.3, -0.45, -0.15]}}
    others = {"none": {"finalist_change": {"reconstructions": [0.5, 0.25, 0.75]}}}
    judgement(tmp_path, 0, {"none": 100.0, "decoder": 97.0, "gain": 99.0}, change, others=others)
    table = effect_verdict.arm_table("epsilon-009000", "SDXL", tmp_path)
    first, second, third = table.splitlines()[2:5]
    assert first.startswith("| decoder | 97.00 | 102.00 | 9.70 | 14.70 | -3.0% (-4.5% to -1.5%) |  |")
    assert second.startswith("| gain | 99.00 | 104.00 | 9.90 | 14.90 |  |  |")
    assert third.startswith("| none | 100.00 | 105.00 | 10.00 | 15.00 |  | +5.0% (+2.5% to +7.5%) |")
    assert effect_verdict.verdict_row("epsilon", tmp_path) is None, "seed 0 only chooses"
    assert effect_verdict.arm_table("flow-009000", "SD3", tmp_path) == ""
    page = "a\n<!-- arms epsilon -->\nold\n<!-- end of arms epsilon -->\nb"
    assert put_tables(page, {"arms epsilon": table}) == page.replace("old", table)
    assert "*Not measured yet.*" in put_tables(page, {"arms epsilon": ""})


def test_the_table_of_seeds_has_their_mean(tmp_path):
    for seed, value in ((0, 50.0), (1, 90.0), (2, 94.0)):
        judgement(tmp_path, seed, {"none": value + 4, "decoder-full": value})
    judgement(tmp_path, 3, {"none": 98.0})
    lines = effect_verdict.seeds_table("epsilon", tmp_path).splitlines()
    assert "seed 1 | seed 2 | seed 3 | mean" in lines[0] and "seed 0" not in lines[0]
    assert lines[2] == "| none | 94.00 / 9.40 | 98.00 / 9.80 | 98.00 / 9.80 | 96.67 / 9.67 |"
    assert lines[3] == "| decoder-full | 90.00 / 9.00 | 94.00 / 9.40 |  |  |"


def test_the_verdict_has_a_row_for_each_framework(tmp_path):
    """The mean of the differences of each seed, not the difference of the means, with an interval."""
    assert effect_verdict.verdict_table(tmp_path) == ""
    for seed, none in ((1, 100.0), (2, 200.0)):
        lower = -0.1 * seed * none / 10
        judgement(tmp_path, seed, {"none": none, "decoder-full": none + 10 * lower, "latent-full": none - 1},
                  changes={"decoder-full": {"reconstructions": [lower, lower - 1, lower + 1]}},
                  others={"decoder-full": {"twin_change": {"reconstructions": [-none / 50] * 3}}})  # fmt: skip
    head, _, row = effect_verdict.verdict_table(tmp_path).splitlines()
    assert head.count("|") == row.count("|") and row.startswith("| SDXL, epsilon-prediction | 1, 2 | 15.00 | 12.50 | ")
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[5].startswith("-15.0% (") and cells[7] == "-20.0% (-20.0% to -20.0%)"
    assert cells[6] == cells[8] == "" and cells[9] == "missed", "the runs overlap"


@pytest.mark.parametrize(("values", "told"), [
    ({"none": 100.0, "decoder-full": 90.0}, "reached"),
    ({"none": 100.0, "decoder-full": 97.0}, "missed"),
    ({"none": [100.0, 10.0], "decoder-full": [97.0, 9.0]}, "reached to reconstructions only"),
    ({"none": [100.0, 10.0], "decoder-full": [90.0, 9.7]}, "reached to pictures only"),
])  # fmt: skip
def test_the_bar_is_asked_of_both_references(values, told, tmp_path):
    judgement(tmp_path, 1, {**values, "latent-full": 99.0})
    assert effect_verdict.verdict_table(tmp_path).splitlines()[2].endswith(f"| {told} |")


def test_the_page_is_what_the_results_say():
    page = ROOT / "docs" / "effect.md"
    text = page.read_text(encoding="utf-8")
    tables = effect_verdict.all_tables()
    assert text == put_tables(text, tables), "run benchmarks/effect_verdict.py"
    assert not [mark for mark, table in tables.items() if table and f"<!-- {mark} -->" not in text], "have no place"
    kept = effect_results.read("effect")
    rows = [row for row in map(effect_verdict.verdict_row, effect_verdict.BASES) if row]
    assert (kept or {"verdict": []})["verdict"] == rows


def test_a_picture_has_every_run(tmp_path, monkeypatch):
    """A line for each seed in both panels; its points are the distances of the files. Seed 0 is left out."""
    from matplotlib import pyplot as plt

    from benchmarks import effect_plots

    assert not effect_plots.seeds_picture(tmp_path / "none.png", tmp_path) and not (tmp_path / "none.png").exists()
    judgement(tmp_path, 0, {"none": 1.0, "decoder-full": 2.0})  # chose the arm
    judgement(tmp_path, 1, {"none": 100.0, "classifier": 1.0, "decoder-full": 97.0, "latent-full": 99.0})
    judgement(tmp_path, 2, {"none": 90.0, "decoder-full": 91.0})
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    assert effect_plots.seeds_picture(tmp_path / "runs.png", tmp_path)
    axis = figures[0].axes[1]  # to the reconstructions
    drawn = [line.get_ydata().tolist() for line in axis.lines if str(line.get_label()).startswith("seed")]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["none", "decoder-full", "latent-full"]
    assert drawn == [[10.0, 9.7, 9.9], [9.0, 9.1]]
    assert axis.lines[-1].get_ydata()[0] == pytest.approx(0.94 * 9.5)
    monkeypatch.undo()
    plt.close(figures[0])


def test_a_picture_has_the_time_of_every_run(tmp_path, monkeypatch):
    """*none* at every length with a line through its means, arms at the time of 1,000 steps; others are left out."""
    from matplotlib import pyplot as plt

    from benchmarks import effect_plots

    assert not effect_plots.cost_picture(tmp_path / "cost.png", results=tmp_path)
    for seed, value in ((1, 50.0), (2, 52.0), (0, 1.0)):
        judgement(tmp_path, seed, {"none": value, "decoder-full": value - 2, "gain": 3.0})
        judgement(tmp_path, seed, {"none": value - 20, "decoder-full": 1.0}, steps=2500)
        judgement(tmp_path, seed, {"none": 2.0}, guidance=3)
    (tmp_path / "effect-cost-epsilon-009000.json").write_text(json.dumps({
        "ratio_to_the_first": {"none": 1.0, "decoder-full": 2.4},
    }))  # fmt: skip
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    assert effect_plots.cost_picture(tmp_path / "cost.png", results=tmp_path)
    lines = {line.get_label(): line for line in figures[0].axes[0].lines}
    found = {label: (line.get_xdata().tolist(), line.get_ydata().tolist()) for label, line in lines.items()}
    assert found["none"] == ([1.0, 1.0, 2.5, 2.5], [5.0, 5.2, 3.0, 3.2])
    assert found["decoder-full"] == ([2.4, 2.4], [4.8, 5.0])
    assert ([1.0, 2.5], [5.1, 3.1]) in found.values() and "gain" not in found
    monkeypatch.undo()
    plt.close(figures[0])


def test_a_picture_has_every_difference_with_its_interval(tmp_path, monkeypatch):
    """In percent of *none*: arms of seed 0 with the lowest first, the checks of seed 1, and the ablations."""
    from matplotlib import pyplot as plt

    from benchmarks import effect_plots

    assert not effect_plots.arms_picture(tmp_path / "arms.png", results=tmp_path)
    change = {"gain": {"reconstructions": [-0.5, -1, 0]}, "decoder-full": {"reconstructions": [-1, -2, 0.5]}}
    for seed, value in ((0, 100.0), (1, 50.0), (2, 20.0)):
        judgement(tmp_path, seed, {"none": value, "gain": 1.0, "decoder-full": 1.0}, change)
    key = f"perceptual/{JUDGE}"
    rows = [{"model": arm, key: value} | ({f"{key}_change": told} if told else {}) for arm, value, told in (
        ("none", 2.0, None), ("rank-4", 4.0, [1.0, 0.5, 1.5]), ("rank-4-full", 5.0, [1.0, 0.0, 2.0]))]  # fmt: skip
    (tmp_path / "effect-one-step-epsilon-009000-0-400-steps.json").write_text(json.dumps({"rows": rows}))
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    assert effect_plots.arms_picture(tmp_path / "arms.png", results=tmp_path)
    found = {tuple(label.get_text() for label in axis.get_yticklabels()): [
        np.round(line.get_xdata(), 6).tolist() for line in axis.lines[:-1]
    ] for axis in figures[0].axes}  # fmt: skip
    assert found == {("decoder-full", "gain"): [[-20, 5], [-10], [-10, 0], [-5]],
                     ("as in the verdict",): [[-40, 10], [-20]],
                     ("rank-4", "rank-4-full (against rank-4)"): [[25, 75], [50], [0, 50], [25]]}  # fmt: skip
    monkeypatch.undo()
    plt.close(figures[0])


def test_a_picture_has_samples_of_the_same_captions(tmp_path, monkeypatch):
    """A strip for the pictures and one for each arm; a framework without all of them has none."""
    from matplotlib import pyplot as plt

    from benchmarks import effect_plots

    assert not effect_plots.samples_picture(tmp_path / "samples.png", tmp_path)
    arms = tmp_path / "samples" / "arms"
    folders = [
        tmp_path / "reconstructions" / "sdxl",
        arms / "flow-009000" / "none-1" / "guidance-1",
        *(arms / "epsilon-009000" / f"{arm}-1" / "guidance-1" for arm in ("none", "decoder-full", "latent-full")),
    ]
    for place, folder in enumerate(folders):
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (60 * place, 50 * number, 0)).save(folder / f"{number}.png")
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    assert effect_plots.samples_picture(tmp_path / "samples.png", tmp_path, columns=2)
    strips = [axis.images[0].get_array() for axis in figures[0].axes]
    colours = [[strip[4, column] for column in (4, 12)] for strip in strips]
    assert np.allclose(np.array(colours) * 255, [[[60 * place, 50 * number, 0] for number in (1, 3)]
                                                 for place in (0, 2, 3, 4)])  # fmt: skip
    monkeypatch.undo()
    plt.close(figures[0])


def test_other_conditions_are_compared_with_none_of_the_same(tmp_path):
    """Means over seeds; more training steps, guidance and sampling steps each have rows of their own."""
    assert effect_verdict.conditions_table("epsilon", tmp_path) == ""
    for seed, value in ((1, 100.0), (2, 200.0)):
        judgement(tmp_path, seed, {"none": value, "decoder-full": value - 3})
        lower = {"decoder-full": {"reconstructions": [-value / 40] * 3}}
        judgement(tmp_path, seed, {"none": value / 2, "decoder-full": value / 4}, lower, guidance=3)
    judgement(tmp_path, 1, {"none": 90.0}, steps=1500, command="python y")
    judgement(tmp_path, 0, {"none": 1.0, "decoder-full": 2.0})
    judgement(tmp_path, 0, {"none": 1.0}, steps=400)
    judgement(tmp_path, 3, {"none": 1.0, "decoder-full": 2.0}, samples=96)
    lower = {"decoder-full": {"reconstructions": [-2.0, -2.2, -1.8]}}
    judgement(tmp_path, 1, {"none": 80.0, "decoder-full": 60.0}, lower, sampling_steps=50)
    lines = effect_verdict.conditions_table("epsilon", tmp_path).splitlines()[2:]
    assert lines == [
        "| 1,000 | 1 | 50 | none | 1 | 80.00 | 8.00 |  |",
        "| 1,000 | 1 | 50 | decoder-full | 1 | 60.00 | 6.00 | -25.0% (-27.5% to -22.5%) |",
        "| 1,000 | 3 | 25 | none | 1, 2 | 75.00 | 7.50 |  |",
        "| 1,000 | 3 | 25 | decoder-full | 1, 2 | 37.50 | 3.75 | -50.0% (-50.0% to -50.0%) |",
        "| 1,500 | 1 | 25 | none | 1 | 90.00 | 9.00 |  |",
        "",
        "`python x`, commit 0123456, CPU, 2026-11-28.",
        "",
        "`python y`, commit 0123456, CPU, 2026-11-28.",
    ]
    assert [row["arm"] for row in effect_results.judged("epsilon-009000", tmp_path)] == ["none", "decoder-full"] * 3


def test_differences_have_the_interval_of_a_seed_and_one_over_seeds(tmp_path):
    """For -2, -3 and -4 %: -3 %, and 4.303 / sqrt(3) % of training with 3 % of sampling in quadrature: 3.9 %."""
    for seed, value in ((1, 9.8), (2, 9.7), (3, 9.6)):
        change = {"decoder-full": {"reconstructions": [value / 10 - 1, -0.05, 0.01]}}
        judgement(tmp_path, seed, {"none": 10.0, "decoder-full": value}, change)
    judgement(tmp_path, 0, {"none": 1.0, "decoder-full": 2.0}, change)
    judgement(tmp_path, 4, {"decoder-full": 2.0}, change)  # of no baseline
    [line] = effect_verdict.changes_table("epsilon", tmp_path).splitlines()[2:]
    assert line == ("| decoder-full | -2.0% (-5.0% to +1.0%) | -3.0% (-5.0% to +1.0%) | -4.0% (-5.0% to +1.0%) | "
                    "-3.0% (-6.9% to +0.9%) |")  # fmt: skip
    assert effect_results.combined([[-2.0, -3.0, -1.0]]) == (-2.0, -3.0, -1.0), "a single seed has its own"


def test_arms_are_compared_with_none_of_as_long(tmp_path):
    """Interpolated between the lengths that a seed has; beyond them, and for arms that are worse, a cell is empty."""
    for seed in (1, 2):
        judgement(tmp_path, seed, {"none": 50.0, "decoder-full": 48.0, "tiny-decoder": 52.0, "classifier": 49.0,
                                   "latent-full": 49.0 - seed})  # fmt: skip
        judgement(tmp_path, seed, {"none": 40.0 + seed}, steps=2000)
        judgement(tmp_path, seed, {"none": 30.0 + seed}, steps=3000)
        judgement(tmp_path, seed, {"none": 1.0}, steps=2500, guidance=3)
    judgement(tmp_path, 1, {"none": 31.0}, steps=3001)
    judgement(tmp_path, 1, {"none": 3.0}, steps=9000)
    assert effect_verdict.cost_table("epsilon", tmp_path) == ""
    arms = {"none": 1.0, "decoder-full": 2.5, "tiny-decoder": 1.5, "classifier": 3.2, "latent-full": 1.0}
    (tmp_path / "effect-cost-epsilon-009000.json").write_text(json.dumps({
        "command": "python x", "commit": "0123456789", "device": "CPU", "date": "2026-11-28",
        "seconds_a_sample": {arm: 0.008 * ratio for arm, ratio in arms.items()}, "ratio_to_the_first": arms,
    }))  # fmt: skip
    lines = effect_verdict.cost_table("epsilon", tmp_path).splitlines()[2:7]
    assert lines[0] == "| none | 8.0 | 1.00 |  |  |  |  |  |"
    # seeds 1 and 2 at 2,500: 3.6 and 3.7; 4.8 lies 0.2 below 5, of 0.9 and 0.8 in 1,000 steps
    assert lines[1].startswith("| decoder-full | 20.0 | 2.50 | 1, 2 | 4.80 | 3.65 | +31.5% (")
    assert lines[1].endswith(f"| {1000 + 1000 * (0.2 / 0.9 + 0.2 / 0.8) / 2:,.0f} steps |")
    assert lines[2].startswith("| tiny-decoder | 12.0 | 1.50 | 1, 2 | 5.20 | 4.57 | +13.7% (") and lines[2].endswith(
        "|  |"
    )
    assert lines[3] == "| classifier | 25.6 | 3.20 |  |  |  |  |  |", "seed 2 has no run as long"
    cost = json.loads((tmp_path / "effect-cost-epsilon-009000.json").read_text())
    cost["ratio_to_the_first"]["classifier"] = 3.1
    (tmp_path / "effect-cost-epsilon-009000.json").write_text(json.dumps(cost))
    line = effect_verdict.cost_table("epsilon", tmp_path).splitlines()[5]
    of_seeds = 3.1 - 2.8 * (3100 - 3001) / 5999, 3.2  # seed 2 has 3,000 steps, 3 % less
    assert f"| 3.10 | 1, 2 | 4.90 | {sum(of_seeds) / 2:.2f} | " in line
    assert "| 4.75 | 5.00 | -5.0% (" in lines[4]


def test_copies_are_told_from_new_pictures(tmp_path):
    """Kernel distances in thousandths, to training pictures from the judgements, to held-out ones from their own file;
    distances to the nearest training picture."""
    assert effect_verdict.copies_table("epsilon", tmp_path) == ""
    for seed in (1, 2):
        change = {"decoder-full": {"kernel_change": {"reconstructions": [-1e-4 * seed] * 3}}}
        judgement(tmp_path, seed, {"none": 10.0 + seed, "decoder-full": 9.0}, others=change)
        judgement(tmp_path, seed, {"none": 5.0}, steps=2600)
        judgement(tmp_path, seed, {"none": 1.0}, guidance=3)
        none = {"model": "none", "kernel": 2e-3 * seed, "generated": 7.0, "held_out": 8.0}
        lpl = {"model": "decoder-full", "kernel": 1e-3, "kernel_change": [1e-3 - 2e-3 * seed] * 3, "generated": 6.0,
               "held_out": 8.0}  # fmt: skip
        for steps, rows, ending in ((1000, [none, lpl], ""), (2600, [none | {"generated": 3.0}], "-2600-steps")):
            content = {"command": "python x", "commit": "0123456789-dirty", "device": "CPU", "date": "2026-11-28",
                       "steps": steps, "seed": seed, "rows": rows}  # fmt: skip
            (tmp_path / f"effect-copies-epsilon-009000-{seed}{ending}.json").write_text(json.dumps(content))
    lines = effect_verdict.copies_table("epsilon", tmp_path).splitlines()
    assert lines[0].count("|") == lines[2].count("|") == lines[1].count("|")
    assert lines[2] == "| none | 1, 2 | 0.115 |  | 3.000 |  | 7.00 | 8.00 |"
    assert lines[3].startswith("| decoder-full | 1, 2 | 0.090 | -0.150 (-0.785 to +0.485) | 1.000 | -2.000 (")
    assert lines[4] == "| none, 2,600 steps | 1, 2 | 0.050 |  | 3.000 |  | 3.00 | 8.00 |"
    assert "commit 0123456 with changes, " in lines[-1]


def test_gradients_are_those_of_the_fresh_seeds(tmp_path):
    """Of five steps each; an arm without the loss, and one of other lengths, have none."""
    assert effect_verdict.gradients_table("epsilon", tmp_path) == ""

    def arm(name, seed, ratios, steps=1000):
        at = {str(place): {"gradient/diffusion": 2.0, "gradient/lpl": 2 * ratio} for place, ratio in enumerate(ratios)}
        file = tmp_path / f"effect-arm-epsilon-009000-{name}-{seed}{'' if steps == 1000 else f'-{steps}-steps'}.json"
        file.write_text(json.dumps({"arm": name, "seed": seed, "steps": steps, "gradient_norms": at}))

    arm("decoder-full", 0, [100.0])
    arm("decoder-full", 1, [0.5, 0.75, 1.0])
    arm("decoder-full", 2, [0.25, 0.5])
    arm("decoder-full", 2, [100.0], steps=2600)
    arm("none", 1, [0.0])
    assert effect_verdict.gradients_table("epsilon", tmp_path).splitlines()[2:] == [
        "| decoder-full | 1, 2 | 0.50 | 0.25 | 1.00 |"
    ]


def test_a_result_names_its_commit(tmp_path, monkeypatch):
    """What experiments write does not make the commit another one; code that is not committed does."""
    monkeypatch.setattr(records, "ROOT", tmp_path)
    assert records.commit() == "unknown"
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    files = [tmp_path / name for name in ("code.py", "docs/page.md", "benchmarks/results/a.json")]
    for path in files:
        path.write_text("1")
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    head = records.commit()
    assert len(head) == 40
    for path in files[1:]:
        path.write_text("2")
    (tmp_path / "new.txt").touch()
    assert records.commit() == head
    files[0].write_text("2")
    assert records.commit() == f"{head}-dirty"


def one_step(folder, seed, values):
    """A result as `effect.py one-step` writes it. values: {arm: perceptual distance by Lite2}; others are from it."""
    keys = ("perceptual/efficientnet-lite0", "psnr", "latent_mse", "high_frequency", "gain")
    rows = [{"model": arm, "perceptual/efficientnet-lite2": value, "psnr_change": [0.0, -1.0, 1.0],
             **{key: value + place for place, key in enumerate(keys, 1)}}
            for arm, value in values.items()]  # fmt: skip
    for row in rows[1:]:
        row["perceptual/efficientnet-lite2_change"] = [row[f"perceptual/{JUDGE}"] - values["none"]] * 3
        row["latent_mse_change"] = [0.5, 0.25, 0.75]
    content = {"command": "python x", "commit": "0123456789", "device": "CPU", "date": "2026-11-28", "rows": rows}
    (folder / f"effect-one-step-epsilon-009000-{seed}.json").write_text(json.dumps(content))


def test_the_one_step_test_is_a_mean_over_seeds(tmp_path):
    """In the table and in the verdict, which has it only when every seed does."""
    assert effect_verdict.one_step_table("epsilon", tmp_path) == ""
    for seed, value in ((1, 0.25), (2, 0.75)):
        judgement(tmp_path, seed, {"none": 100.0, "decoder-full": 90.0})
        assert effect_verdict.verdict_row("epsilon", tmp_path)["onestep"] == {}
        one_step(tmp_path, seed, {"none": value, "decoder-full": value / 2})
    found = effect_verdict.verdict_row("epsilon", tmp_path)["onestep"]
    assert found["perceptual/efficientnet-lite2"] == 0.25 and found["perceptual/efficientnet-lite2_baseline"] == 0.5
    assert found["psnr"] == 2.25 and "psnr_change" not in found
    lines = effect_verdict.one_step_table("epsilon", tmp_path).splitlines()
    assert "mean of seeds 1, 2" in lines[0]
    assert lines[2] == "| none | 0.5000 | 1.5000 | 2.50 | 3.5000 | 4.500 | 5.500 |  |  |"
    assert lines[3].startswith(
        "| decoder-full | 0.2500 | 1.2500 | 2.25 | 3.2500 | 4.250 | 5.250 | -50.0% (-50.0% to -50.0%) |"
    )
    assert lines[3].split("|")[9].startswith(" +14.")


def test_ablations_name_what_differs(tmp_path):
    """The flags that the finalist does not have so, differences in percent, and the ratio of the gradients."""
    assert effect_verdict.ablation_table(results=tmp_path) == ""
    key = f"perceptual/{JUDGE}"
    values = {"none": 0.5, "decoder-full": 0.25, "l1": 0.75, "rank-4": 0.4, "rank-4-full": 0.5}
    changes = {"decoder-full": -0.25, "l1": 0.25, "rank-4": -0.1, "rank-4-full": 0.1}
    rows = [{"model": arm, key: value, "latent_mse": 1.0, "high_frequency": 2.0, "gain": 3.0}
            | ({f"{key}_change": [changes[arm]] * 3} if arm in changes else {})
            | ({f"{key}_finalist_change": [0.5, 0.25, 0.75]} if arm == "l1" else {})
            for arm, value in values.items()]  # fmt: skip
    about = {"command": "python x", "commit": "0123456789", "device": "CPU", "date": "2026-11-28"}
    result = tmp_path / "effect-one-step-epsilon-009000-0-400-steps.json"
    result.write_text(json.dumps(about | {"rows": rows, "steps": 400}))
    norms = {str(step): {"gradient/lpl": step, "gradient/diffusion": 4.0} for step in (1, 2, 4)}
    run = tmp_path / "effect-arm-epsilon-009000-l1-0-400-steps.json"
    run.write_text(json.dumps({"gradient_norms": norms | {"0": {"gradient/diffusion": 4.0}}}))
    lines = effect_verdict.ablation_table(results=tmp_path).splitlines()
    assert lines[2] == "| none | 0.5000 |  |  | 1.0000 | 2.0000 | 3.0000 |  |"
    assert lines[3].startswith("| decoder-full | 0.2500 | -50.0% (-50.0% to -50.0%) |  | ")
    assert lines[4].startswith("| l1 (`--lpl_loss_type l1`) | 0.7500 | +50.0% (+50.0% to +50.0%) | +200.0% (+100.0% ")
    assert lines[4].endswith(" | 0.50 |")
    assert lines[6].startswith("| rank-4-full (`--use_lora --learning_rate 1e-3 --rank 4`) | 0.5000 | +25.0% ")


def test_checks_change_one_thing_each(tmp_path):
    """Each against *none* of the same conditions; other seeds are left out."""
    change = {
        arm: {"pictures": [-3, -9, 9], "reconstructions": [-1, -2, 0]}
        for arm in ("decoder-full", *(f"decoder-full-{kind}" for kind in ("share-0.05", "share-0.4", "gate-1")))
    }
    judgement(tmp_path, 1, {"none": 100.0, "decoder-full": 90.0}, change)
    assert effect_verdict.checks_table(results=tmp_path) == ""
    arms = {"decoder-full-share-0.4": 80.0, "decoder-full-share-0.05": 95.0, "decoder-full-gate-1": 85.0}
    judgement(tmp_path, 1, {"none": 100.0, "decoder-full": 90.0, **arms}, change)
    judgement(tmp_path, 1, {"none": 200.0, "decoder-full": 190.0}, change, guidance=3)
    judgement(tmp_path, 1, {"none": 50.0, "decoder-full": 49.0}, change, steps=3000)
    judgement(tmp_path, 2, {"none": 1.0, "decoder-full-gate-1": 2.0}, change, steps=3000)
    judgement(tmp_path, 2, {"none": 1.0, **dict.fromkeys(change, 2.0)}, change)
    lines = effect_verdict.checks_table(results=tmp_path).splitlines()
    assert lines[8:] == ["", "`python x`, commit 0123456, CPU, 2026-11-28."]
    assert lines[2:8] == [
        "| as in the verdict | 10.00 | 9.00 | -10.0% (-20.0% to +0.0%) | -3.0% (-9.0% to +9.0%) |",
        "| a share of 0.05 | 10.00 | 9.50 | -10.0% (-20.0% to +0.0%) | -3.0% (-9.0% to +9.0%) |",
        "| a share of 0.4 | 10.00 | 8.00 | -10.0% (-20.0% to +0.0%) | -3.0% (-9.0% to +9.0%) |",
        "| sigma / alpha up to 1 | 10.00 | 8.50 | -10.0% (-20.0% to +0.0%) | -3.0% (-9.0% to +9.0%) |",
        "| guidance 3 | 20.00 | 19.00 | -5.0% (-10.0% to +0.0%) | -1.5% (-4.5% to +4.5%) |",
        "| 3,000 steps | 5.00 | 4.90 | -20.0% (-40.0% to +0.0%) | -6.0% (-18.0% to +18.0%) |",
    ]


def test_differences_from_the_finalist_are_relative_to_none(tmp_path):
    others = {arm: {"finalist_change": {"reconstructions": [0.5, 0.25, 0.75]}} for arm in ("none", "l1")}
    judgement(tmp_path, 1, {"none": 100.0, "decoder-full": 50.0, "l1": 55.0}, others=others)
    lines = effect_verdict.changes_table("epsilon", tmp_path, "finalist_change").splitlines()
    assert "against decoder-full" in lines[0]
    assert lines[2:] == ["| l1 | +5.0% (+2.5% to +7.5%) | +5.0% (+2.5% to +7.5%) |"]

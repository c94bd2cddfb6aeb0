"""The experiment's verdict: what the files say is what the page and `effect.json` say."""

import json

import pytest

from benchmarks import effect_verdict
from benchmarks.records import put_tables
from tests.runs import ROOT


def judgement(folder, seed, distances, changes=None):
    """A result as `effect.py judge` writes it. distances: {arm: Fréchet distance by both networks}."""
    places = {arm: f"/w/arms/epsilon/{arm}-{seed}" + "/guidance-1" * (arm == "gain") for arm in distances}
    names = {arm: "guidance-1" if arm == "gain" else f"{arm}-{seed}" for arm in distances}
    rows = [{"model": names[arm], "guidance": 1.0, "network": network, "frechet": value + extra, "kernel": value / 1e4}
            for arm, value in distances.items() for network, extra in (("efficientnet-lite2", 0),
                                                                       ("efficientnet-lite0", 5))]  # fmt: skip
    differences = [{"a": names["none"], "b": names[arm], "metric": "frechet", "network": "efficientnet-lite2",
                    "value": 0, "low": low, "high": high} for arm, (low, high) in (changes or {}).items()]  # fmt: skip
    content = {"command": "python x", "commit": "0123456789", "device": "CPU", "date": "2026-11-28",
               "models": [{"name": names[arm], "text": places[arm]} for arm in distances],
               "distances": rows, "differences": differences}  # fmt: skip
    (folder / f"effect-epsilon-{seed}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("runs", "twin", "reached"), [
    ([90.0, 91.0, 92.0], 99.0, True),
    ([90.0, 91.0, 99.5], 99.0, False),  # one run above the best run without
    ([95.0, 95.0, 95.0], 99.0, False),  # 5 %
    ([90.0, 91.0, 92.0], 91.0, False),  # the twin does as well
])  # fmt: skip
def test_the_bar(runs, twin, reached, tmp_path):
    for seed, value in enumerate(runs, 1):
        judgement(tmp_path, seed, {"none": 98.0 + seed, "decoder-full": value, "latent-full": twin, "gain": 97.0})
    row = effect_verdict.verdict_row("epsilon", tmp_path)
    assert row["arm"] == "decoder-full" and row["seeds"] == [1, 2, 3] and row["bar_reached"] is reached
    assert row["fd_mean"] == pytest.approx(sum(runs) / 3) and row["fd_baseline_mean"] == pytest.approx(100)
    assert row["fd_control_mean"] == pytest.approx(twin)
    assert effect_verdict.verdict_row("flow", tmp_path) is None


def test_tables_have_what_the_files_have(tmp_path):
    judgement(tmp_path, 0, {"none": 100.0, "decoder": 97.0, "gain": 99.0}, {"decoder": (-4.5, -1.5)})
    table = effect_verdict.arm_table("epsilon", tmp_path)
    first, second, third = table.splitlines()[2:5]
    assert first.startswith("| decoder | 97.00 | -3.0% | -4.50 to -1.50 | 102.00 |")
    assert second.startswith("| gain | 99.00 | -1.0% |") and third.startswith("| none | 100.00 | +0.0% |")
    assert effect_verdict.verdict_row("epsilon", tmp_path) is None, "seed 0 only chooses"
    page = "a\n<!-- arms epsilon -->\nold\n<!-- end of arms epsilon -->\nb"
    assert put_tables(page, {"arms epsilon": table}) == page.replace("old", table)
    assert "*Not measured yet.*" in put_tables(page, {"arms epsilon": ""})


def test_the_page_is_what_the_results_say():
    page = ROOT / "docs" / "effect.md"
    text = page.read_text(encoding="utf-8")
    assert text == put_tables(text, effect_verdict.all_tables()), "run benchmarks/effect_verdict.py"
    kept = effect_verdict.read("effect")
    rows = [row for row in map(effect_verdict.verdict_row, effect_verdict.BASES) if row]
    assert (kept or {"verdict": []})["verdict"] == rows

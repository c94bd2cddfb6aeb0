"""The verdict of an evaluation: its sentences, and when a difference is none."""

import pytest

from lpl_finetuning.evaluation.verdict import judged, number, verdict_sentences
from tests.synthetic_metrics import metrics_of

A, B = "without-lpl", "with-lpl"


@pytest.mark.parametrize(("low", "high", "better", "verdict"), [
    (-2, -1, "lower", "b"), (1, 2, "lower", "a"), (-2, -1, "higher", "a"), (1, 2, "higher", "b"),
    (-1, 1, "lower", "none"), (0, 1, "lower", "none"), (-1, 0, "higher", "none"), (0, 0, "lower", "none"),
    (float("nan"), float("nan"), "lower", "none"),
])  # fmt: skip
def test_an_interval_that_holds_0_is_no_difference(low, high, better, verdict):
    assert judged(low, high, better) == verdict


def test_the_first_sentence_names_the_better_model():
    first, others, one_step, *rest = verdict_sentences(metrics_of((A, B)))
    assert first.startswith(f"{B}'s pictures are closer to the real ones than {A}'s. Fréchet distance (EfficientNet-")
    assert "149.38 against 154.00 at guidance 3, difference −4.62 (95 % interval −6.93 to −2.31)" in first
    assert others.endswith(f"recall, density and coverage in favour of {B} at guidance 1 and 3.")
    assert one_step.startswith(f"In one step from noise, {B} estimates the pictures better")
    assert rest[-1].startswith("The intervals") and "second seed" in rest[-1]
    assert any("96 pictures are few" in sentence for sentence in rest)


def test_a_worse_model_is_not_called_better():
    first = verdict_sentences(metrics_of((A, B), effect=-3))[0]
    assert first.startswith(f"{A}'s pictures are closer to the real ones than {B}'s.")


def test_without_a_difference_no_model_wins():
    first, others, *_ = verdict_sentences(metrics_of((A, B), effect=0.5))
    assert first.startswith(f"No difference between {A} and {B} can be told. ") and "to " in first
    assert others == f"No other measure of the pictures tells {A} from {B}."


def test_with_few_pictures_the_kernel_distance_decides():
    metrics = metrics_of((A, B))
    metrics["networks"][0]["decides"] = "kernel"
    for row in metrics["differences"]:
        if row["metric"] == "kernel":
            row.update(value=0.002, low=0.0011, high=0.0029, verdict="a")
    first, others, *_ = verdict_sentences(metrics)
    assert first.startswith(
        f"{A}'s pictures are closer to the real ones than {B}'s. Kernel distance (EfficientNet-Lite2)"
    )
    assert "difference 0.0020 (95 % interval 0.0011 to 0.0029)" in first
    assert "Fréchet distance" in others and others.endswith(f"in favour of {B} at guidance 1 and 3.")


def test_few_pictures_of_the_one_step_test_are_a_caution():
    metrics = metrics_of((A, B))
    assert not any("one-step test has" in sentence for sentence in verdict_sentences(metrics))
    metrics["one_step"]["pictures"] = 2
    assert any("the one-step test has 2 pictures" in sentence for sentence in verdict_sentences(metrics))


def test_a_difference_over_all_levels_alone_is_told_as_that():
    metrics = metrics_of((A, B))
    for row in metrics["one_step"]["differences"]:
        if row["level"] is not None:
            row["verdict"] = "none"
    [told] = [text for text in verdict_sentences(metrics) if text.startswith("In one step from noise")]
    assert f"{B} estimates the pictures better, over all noise levels together, and at none of them alone" in told


def test_one_step_measures_that_differ_are_named_beside_those_that_do_not():
    metrics = metrics_of((A, B))
    for row in metrics["one_step"]["differences"]:
        row["verdict"] = "a" if row["metric"] in ("lpl/mid", "lpl/up_0", "psnr") else "none"
    sentences = verdict_sentences(metrics)
    place = next(i for i, sentence in enumerate(sentences) if "equally well" in sentence)
    told = sentences[place + 1]
    assert (
        told
        == f"Other one-step measures that differ, {B} against {A}: LPL of the mid and up_0 and PSNR in favour of {A}."
    )


@pytest.mark.parametrize(("guidance", "told"), [((1.0, 3.0), True), ((1.0,), False)])
def test_many_intervals_come_with_a_word_about_chance(guidance, told):
    metrics = metrics_of((A, B))
    metrics["differences"] = [row for row in metrics["differences"] if row["guidance"] in guidance]
    count = sum(row["network"] == metrics["networks"][0]["name"] for row in metrics["differences"])
    words = (
        f"Of the {count} differences by EfficientNet-Lite2 about 1 would be called better or worse by chance alone."
    )
    assert (words in verdict_sentences(metrics)) == told == (count >= 12)


def test_guidance_scales_that_disagree_are_told_apart():
    metrics = metrics_of((A, B))
    for row in metrics["differences"]:
        if row["guidance"] == 3.0 and row["metric"] == "frechet":
            row.update(value=1.0, low=-1.0, high=3.0, verdict="none")
    won, none, *_ = verdict_sentences(metrics)
    assert won.startswith(f"{B}'s pictures are closer to the real ones than {A}'s at guidance 1.")
    assert none.startswith(f"No difference between {A} and {B} can be told at guidance 3.")


def test_no_verdict_rests_on_a_network_that_is_not_independent():
    """Neither as the first network nor as the only network."""
    metrics = metrics_of((A, B))
    metrics["networks"].reverse()
    assert "(EfficientNet-Lite2)" in verdict_sentences(metrics)[0]
    assert not any("Lite0" in sentence for sentence in verdict_sentences(metrics))
    metrics["networks"] = [network for network in metrics["networks"] if not network["independent"]]
    first, *rest = verdict_sentences(metrics)
    assert first.startswith("No verdict on the pictures: Fréchet distance (EfficientNet-Lite0)")
    assert not any("closer" in sentence or "one step" in sentence for sentence in rest)


def test_copies_are_told():
    metrics = metrics_of((A, B))
    row = next(row for row in metrics["distances"] if row["model"] == B and row["network"] == "efficientnet-lite2")
    row["memorisation"] = {"generated": 1.0, "held_out": 2.0, "value": -1.0, "low": -1.2, "high": -0.8}
    assert any(sentence.startswith(f"{B} may copy at guidance 1") for sentence in verdict_sentences(metrics))
    row["memorisation"]["high"] = 0.1
    assert not any("may copy" in sentence for sentence in verdict_sentences(metrics))


def test_finished_pictures_have_no_guidance():
    metrics = metrics_of((A, B), guidance=(None,))
    first = verdict_sentences(metrics)[0]
    assert "guidance" not in first and "149.38 against 154.00, difference" in first


def test_numbers_have_a_minus_sign_and_no_negative_zero():
    assert number(-1.25, 2) == "−1.25" and number(-1e-6, 2) == "0.00" and number(1234.5, 1) == "1,234.5"
    assert number(-0.0012, 2) == "−0.001" and number(0.00004, 4) == "0.00004" and number(0, 2) == "0.00"
    assert number(None, 2) == number(float("nan"), 2) == "–"


def test_finished_pictures_stand_for_every_guidance():
    metrics = metrics_of((A, B))
    for row in metrics["distances"]:
        if row["model"] == B:
            row.update(guidance=None, frechet=100.0)
    assert "100.00 against 169.40 at guidance 1" in verdict_sentences(metrics)[0]

"""The verdict of an evaluation in sentences, and the names of all measures.

A verdict on pictures rests on a distance by the first network that is independent, and on intervals: on the Fréchet
distance, or on the kernel distance where there are no more pictures than features. A difference whose interval holds 0
is called "none". `metrics` is the content of `metrics.json`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lpl_finetuning.errors import counted

NONE = "none"
FEW_IN_ONE_STEP = 24  # pictures of the one-step test below which a reader is cautioned
MANY_INTERVALS = 12  # from so many on, a reader is told how many differ by chance


@dataclass(frozen=True)
class Measure:
    """How a measure is printed.

    Attributes:
        label: its name in tables.
        better: "lower" or "higher".
        decimals: of its values.
        meaning: a sentence for the legend.
    """

    label: str
    better: str
    decimals: int
    meaning: str


MEASURES = {
    "frechet": Measure("Fréchet distance", "lower", 2, "Distance of two clouds of features by their means and "
                       "covariances. Needs more pictures than the network has features."),
    "kernel": Measure("Kernel distance", "lower", 4, "Unbiased for any number of pictures, so it can fall below 0. "
                      "With the features of Inception it is KID."),
    "precision": Measure("Precision", "higher", 3, "Share of generated pictures that lie within the real ones."),
    "recall": Measure("Recall", "higher", 3, "Share of real pictures that lie within the generated ones: variety."),
    "density": Measure("Density", "higher", 3, "How many real neighbourhoods a generated picture lies in. Above 1 the "
                       "pictures crowd where real ones are dense."),
    "coverage": Measure("Coverage", "higher", 3, "Share of real pictures with a generated picture nearby."),
}  # fmt: skip
SHORT = {"frechet": "Fréchet distance", "kernel": "kernel distance"} | {
    name: name for name in ("precision", "recall", "density", "coverage")
}
ONE_STEP = {
    "perceptual": Measure("Perceptual distance", "lower", 4, "Distance of a network's features at several depths, "
                          "normalised to unit length."),
    "lpl": Measure("LPL", "lower", 4, "Latent perceptual loss of a decoder stage."),
    "latent_mse": Measure("Latent error", "lower", 5, "Mean squared error of the estimated latents."),
    "psnr": Measure("PSNR", "higher", 3, "Peak signal-to-noise ratio of the decoded estimate, in dB."),
}  # fmt: skip
# Measures with an ideal value instead of a better direction; they are drawn and not judged.
IDEALS = {  # (label, meaning, ideal)
    "high_frequency": ("High-frequency power", "Log ratio of the estimate's fine detail to the truth's; below 0 the "
                       "estimate is too smooth.", 0.0),
    "spread": ("Spread", "Ratio of feature variance, estimate to truth; below 1 the estimate is too flat.", 1.0),
    "gain": ("Gain", "Factor that would set the spread of the latents right.", 1.0),
}  # fmt: skip


def judged(low: float, high: float, better: str) -> str:
    """Which of two models is better: "a", "b" or "none".

    Args:
        low, high: interval of the difference, b minus a.
        better: "lower" or "higher".
    """
    if not (low > 0 or high < 0):
        return NONE
    return "b" if (high < 0) == (better == "lower") else "a"


def number(value: float, decimals: int) -> str:
    """A value with a real minus sign; "–" where there is no value.

    A value that would be printed as 0 gets up to two decimals more.
    """
    if value is None or value != value:
        return "–"
    more = next((count for count in range(3) if float(f"{value:.{decimals + count}f}")), 0)
    text = f"{value:,.{decimals + more}f}"
    return text.replace("-", "−") if any(digit in "123456789" for digit in text) else text.removeprefix("-")


def interval_text(row: dict, decimals: int) -> str:
    """ "−3.10 (95 % interval −5.20 to −1.00)"."""
    low, high = number(row["low"], decimals), number(row["high"], decimals)
    return f"{number(row['value'], decimals)} (95 % interval {low} to {high})"


def joined(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    words = list(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def winner(row: dict) -> str | None:
    """Name of the better model of a difference; None if there is no difference."""
    return row.get(row["verdict"]) if row["verdict"] != NONE else None


def network_title(label: str) -> str:
    """ "EfficientNet-Lite2" of the label "Fréchet distance (EfficientNet-Lite2)"; "FID" of "FID"."""
    return label.partition("(")[2].rstrip(")") or label


def verdict_network(metrics: dict) -> dict | None:
    """The network that the verdict rests on: the first independent one; None without any."""
    return next((network for network in metrics["networks"] if network["independent"]), None)


def pairs_of(rows: Iterable[dict]) -> list[tuple[str, str]]:
    """The pairs of models in differences, in order."""
    return list(dict.fromkeys((row["a"], row["b"]) for row in rows))


def verdict_sentences(metrics: dict) -> list[str]:
    """All sentences of the verdict: the pictures, one step, the captions, cautions."""
    network, sentences = verdict_network(metrics), []
    if network is None:
        names = joined([network["label"] for network in metrics["networks"]])
        sentences.append(f"No verdict on the pictures: {names} helped to train the tiny models of this repository and "
                         "can't judge them. Add an independent network with --network.")  # fmt: skip
    else:
        own = [row for row in metrics["differences"] if row["network"] == network["name"]]
        for pair in pairs_of(own):
            rows = [row for row in own if (row["a"], row["b"]) == pair]
            metric = network.get("decides", "frechet")
            deciding, others = (
                [row for row in rows if (row["metric"] == metric) == wanted] for wanted in (True, False)
            )
            sentences += [*_on_pictures(metrics, network, *pair, deciding), *_other_measures(pair, others)]
    sentences += [*_on_one_step(metrics, network), *_on_captions(metrics), *_on_copies(metrics)]
    return sentences + _cautions(metrics, network)


def _value(metrics: dict, network: dict, model: str, guidance: float | None, name: str) -> float:
    return next(row[name] for row in metrics["distances"] if row["network"] == network["name"]
                and row["model"] == model and row["guidance"] in (guidance, None))  # fmt: skip


def at(guidance: float | None) -> str:
    """ " at guidance 3"; empty for folders of pictures, whose guidance nobody knows."""
    return "" if guidance is None else f" at guidance {guidance:g}"


def at_all(places: Sequence[float | None]) -> str:
    """The same for several scales."""
    return "" if None in places else " at guidance " + joined([f"{each:g}" for each in places])


def _on_pictures(metrics: dict, network: dict, a: str, b: str, rows: list[dict]) -> list[str]:
    """One sentence for each outcome of the deciding distance of a pair. rows: its differences."""
    sentences, metric = [], network.get("decides", "frechet")
    label, decimals = network["label"], MEASURES[metric].decimals
    if metric != "frechet":
        label = f"{MEASURES[metric].label} ({network_title(label)})"
    for name in (a, b, None):
        same = [row for row in rows if winner(row) == name]
        if not same:
            continue
        if name is None:
            head = f"No difference between {a} and {b} can be told"
        else:
            head = f"{name}'s pictures are closer to the real ones than {b if name == a else a}'s"
        details = []
        for row in same:
            values = (_value(metrics, network, model, row["guidance"], metric) for model in (b, a))
            ours, theirs = (number(value, decimals) for value in values)
            details.append(f"{ours} against {theirs}{at(row['guidance'])}, difference {interval_text(row, decimals)}")
        where = "" if len(rows) == len(same) else at_all([row["guidance"] for row in same])
        sentences.append(f"{head}{where}. {label}, {b} against {a}: {'; '.join(details)}.")
    return sentences


def _other_measures(pair: tuple[str, str], rows: list[dict]) -> list[str]:
    """What the other distances of the same network say. rows: their differences."""
    found = {}
    for row in rows:
        if winner(row):
            found.setdefault((winner(row), row["guidance"]), []).append(SHORT[row["metric"]])
    if not found:
        return [f"No other measure of the pictures tells {pair[0]} from {pair[1]}."] if rows else []
    same = {}  # one part for all guidance scales with the same outcome
    for (name, guidance), measures in found.items():
        same.setdefault((name, joined(measures)), []).append(guidance)
    parts = [f"{measures} in favour of {name}{at_all(places)}" for (name, measures), places in same.items()]
    return [f"Other measures that differ, {pair[1]} against {pair[0]}: {'; '.join(parts)}."]


def _on_one_step(metrics: dict, network: dict | None) -> list[str]:
    test = metrics.get("one_step")
    if not test or network is None:
        return []
    sentences, metric = [], f"perceptual/{network['name']}"
    families = {model["name"]: model.get("family") for model in metrics["models"]}
    for row in test["differences"]:
        if row["metric"] != metric or row.get("level") is not None:
            continue
        if families[row["a"]] != families[row["b"]]:
            sentences.append(f"No verdict on one step: {row['a']} and {row['b']} have different autoencoders, and "
                             "each is compared with what its own makes of the pictures.")  # fmt: skip
            continue
        name = winner(row)
        levels = [each for each in test["differences"] if each["metric"] == metric and each.get("level") is not None
                  and (each["a"], each["b"]) == (row["a"], row["b"])]  # fmt: skip
        text = f"perceptual distance over all noise levels {interval_text(row, 4)}"
        if name is None:
            sentences.append(f"In one step from noise, {row['a']} and {row['b']} estimate the pictures equally well, "
                             f"as far as can be told. Difference in {text}.")  # fmt: skip
            continue
        won = sum(winner(each) == name for each in levels)
        where = f"beyond the interval at {won} of {len(levels)} noise levels" if won else \
            "over all noise levels together, and at none of them alone beyond its interval"  # fmt: skip
        sentences.append(f"In one step from noise, {name} estimates the pictures better, {where}. Difference in "
                         f"{text}.")  # fmt: skip
    return sentences + _other_one_step_measures(test, metric, families)


def _other_one_step_measures(test: dict, decided: str, families: dict) -> list[str]:
    """What the other measures of the one-step test say over all levels. decided: the measure of the verdict."""
    sentences, found = [], {}
    for row in test["differences"]:
        kind, _, part = row["metric"].partition("/")
        comparable = families[row["a"]] == families[row["b"]] and kind in ONE_STEP and kind != "perceptual"
        if row["metric"] == decided or row.get("level") is not None or not comparable or not winner(row):
            continue
        label = ONE_STEP[kind].label
        label = label if label.isupper() else label.lower()
        found.setdefault((row["a"], row["b"]), {}).setdefault(winner(row), {}).setdefault(label, []).append(part)
    for (a, b), winners in found.items():
        parts = [joined([f"{label} of the {joined(parts)}" if any(parts) else label for label, parts in own.items()])
                 + f" in favour of {name}" for name, own in winners.items()]  # fmt: skip
        sentences.append(f"Other one-step measures that differ, {b} against {a}: {'; '.join(parts)}.")
    return sentences


def _many_intervals(metrics: dict, network: dict) -> list[str]:
    """A caution where some of many intervals leave out 0 by chance alone."""
    count = sum(row["network"] == network["name"] for row in metrics["differences"])
    if count < MANY_INTERVALS:
        return []
    title, by_chance = network_title(network["label"]), round(count / 20)
    return [
        f"Of the {count} differences by {title} about {by_chance} would be called better or worse by chance alone."
    ]


def _on_captions(metrics: dict) -> list[str]:
    same = {}
    for row in metrics.get("clip_differences") or []:
        same.setdefault((row["a"], row["b"], winner(row)), []).append(row)
    sentences = []
    for (a, b, name), rows in same.items():
        head = f"{name} follows the captions better"
        if name is None:
            head = f"{a} and {b} follow the captions equally well, as far as can be told"
        details = "; ".join(f"{interval_text(row, 2)}{at(row['guidance'])}" for row in rows)
        sentences.append(f"{head}. CLIPScore, {b} minus {a}: {details}.")
    return sentences


def _on_copies(metrics: dict) -> list[str]:
    network, sentences = verdict_network(metrics), []
    for row in metrics["distances"]:
        found = row.get("memorisation")
        if network and row["network"] == network["name"] and found and found["high"] < 0:
            sentences.append(f"{row['model']} may copy{at(row['guidance'])}: the pictures lie nearer to training "
                             f"pictures than held-out pictures do (median distance {number(found['generated'], 2)} "
                             f"against {number(found['held_out'], 2)}).")  # fmt: skip
    return sentences


def _cautions(metrics: dict, network: dict | None) -> list[str]:
    sentences = []
    if network and network.get("warning"):
        sentences.append(f"Caution: {network['warning']}")
    sentences += _many_intervals(metrics, network) if network else []
    test = metrics.get("one_step")
    if test and test["pictures"] < FEW_IN_ONE_STEP:
        few = counted(test["pictures"], "picture")
        sentences.append(f"Caution: the one-step test has {few}. Which ones may decide; some dozens are better.")
    if not metrics["settings"].get("held_out"):
        sentences.append("Caution: without --held_out nothing here tells learning from copying, if the models were "
                         "trained on these pictures.")  # fmt: skip
    sentences.append("The intervals cover chance in the generated pictures. They do not cover chance in training: "
                     "train both models with a second seed before you trust a small difference.")  # fmt: skip
    return sentences

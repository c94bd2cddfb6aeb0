"""The report of an evaluation: `report.html`, one file for any browser, and `metrics.json` beside it.

The page is made of `metrics` alone, whose keys `docs/evaluation.md` lists, and of the pictures that it names. The page
loads nothing from elsewhere: style, script, charts and pictures are inside.
"""

import base64
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from lpl_finetuning.evaluation.charts import Line, interval_bar, is_finite, line_chart
from lpl_finetuning.evaluation.verdict import (
    IDEALS,
    MEASURES,
    NONE,
    ONE_STEP,
    at,
    network_title,
    number,
    pairs_of,
    verdict_network,
    winner,
)
from lpl_finetuning.files import write_whole

TEMPLATE = Path(__file__).with_name("report.html")
MOST_PAIRS = 48  # pictures of a guidance that the page shows
PICTURE_BYTES = 6_500_000  # of all pictures; base64 makes a third more of them
SIDES = (384, 256, 192, 128, 96)  # longest side of the pictures, px: the first that keeps within PICTURE_BYTES
PIXELATED = 128  # px: smaller pictures are enlarged without smoothing, and stored without loss
NO_BREAK_HYPHEN = "\u2011"
COLOURS = 8  # classes c0 … c7 of the template


def write_report(metrics: dict, folder: str | Path) -> Path:
    """Write `metrics.json` and `report.html`; returns the path of the page.

    Args:
        metrics: content of `metrics.json`; relative paths in it start at the folder.
        folder: made if needed.
    """
    folder = Path(folder)
    text = json.dumps(without_nan(metrics), indent=1, ensure_ascii=False)
    write_whole(folder / "metrics.json", text.encode())
    write_whole(folder / "report.html", page(metrics, folder).encode())
    return folder / "report.html"


def without_nan(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page(metrics: dict, folder: Path) -> str:
    """The whole page as HTML."""
    names = [model["name"] for model in metrics["models"]]
    parts = {
        "title": escape(title(names)),
        "facts": facts(metrics),
        "models": "".join(model_line(metrics, number) for number in range(len(names))),
        "verdict": verdict(metrics, names),
        "distances": distances(metrics, names),
        "one_step": one_step(metrics, names),
        "spectrum": spectrum(metrics, names),
        "captions": captions(metrics, names),
        "pictures": pictures(metrics, names, folder),
        "making": making(metrics),
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Small pieces


def style_of(names: Sequence[str], name: str | None) -> str:
    """CSS class of a model's colour; "ink" for anything else."""
    return f"c{names.index(name) % COLOURS}" if name in names else "ink"


def chip(names: Sequence[str], name: str) -> str:
    """A model's name with its colour."""
    return f'<span class="chip {style_of(names, name)}">{escape(name)}</span>'


def section(identity: str, heading: str, lead: str, body: str) -> str:
    """A section of the page; nothing without a body."""
    if not body:
        return ""
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    head = f'<section id="{identity}" aria-labelledby="h-{identity}"><h2 id="h-{identity}">{heading}</h2>'
    return f"{head}{lead}{body}</section>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], style: str = "", caption: str = "") -> str:
    """A table; on a phone each row becomes a block in which every cell has its column's name.

    Args:
        head: names of the columns, text. The first column holds the names of the rows.
        rows: cells, HTML.
        style: CSS class.
        caption: for screen readers.
    """
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = []
    for first, *cells in rows:
        cells = [f'<td data-label="{escape(name)}">{cell}</td>' for name, cell in zip(head[1:], cells, strict=True)]
        body.append(f'<tr><th scope="row">{first}</th>{"".join(cells)}</tr>')
    return (f'<table class="{style}"><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table>")  # fmt: skip


def folded(summary: str, body: str) -> str:
    """A part that is opened by a click."""
    return f"<details><summary>{summary}</summary>{body}</details>"


def legend(names: Sequence[str], real: bool = False) -> str:
    """The colours of the models."""
    chips = [chip(names, name) for name in names]
    return f'<p class="legend">{"".join(chips)}{"<span class=chip>real pictures</span>" * real}</p>'


def choice(name: str, options: Sequence[tuple[str, str]], label: str, checked: str) -> str:
    """Radio buttons in a row: (value, text) each."""
    buttons = [
        f'<label><input type="radio" name="{name}" value="{escape(value)}"{" checked" * (value == checked)}>'
        f"<span>{escape(text)}</span></label>"
        for value, text in options
    ]
    return f'<fieldset class="choice"><legend>{escape(label)}</legend>{"".join(buttons)}</fieldset>'


# ---------------------------------------------------------------------------------------------------------------------
# The head of the page


def title(names: Sequence[str]) -> str:
    """ "b against a" for two models."""
    if len(names) == 1:
        return names[0]
    return f"{names[1]} against {names[0]}" if len(names) == 2 else f"{len(names)} models compared"


def facts(metrics: dict) -> str:
    """The line below the title."""
    settings, real = metrics["settings"], metrics["real"]
    texts = [f"{real['pictures']:,} real pictures"]
    if settings["guidance"]:  # models that made pictures
        guidance = " and ".join(f"{value:g}" for value in settings["guidance"])
        texts += [f"{settings['captions']:,} captions"] if settings["captions"] < real["pictures"] else []
        texts += [f"guidance {guidance}", f"{settings['steps']} steps"]
    texts += [f"{settings['size']} px"] if settings.get("size") else []
    return " · ".join(map(escape, [*texts, metrics["date"]]))


def model_line(metrics: dict, index: int) -> str:
    """A model in the list below the title."""
    model, names = metrics["models"][index], [each["name"] for each in metrics["models"]]
    details = [model["kind"], model.get("prediction"), model.get("sampler")]
    text = ", ".join(str(each) for each in details if each)
    source = f" <code>{escape(model['text'])}</code>" if model.get("text") else ""
    base = ", the baseline" if index == 0 and len(names) > 1 else ""
    return f"<li>{chip(names, model['name'])} <span>{escape(text)}{base}{source}</span></li>"


def verdict(metrics: dict, names: Sequence[str]) -> str:
    """The sentences; the first in large type."""
    sentences = [with_chips(sentence, names) for sentence in metrics["verdict"]]
    if not sentences:
        return ""
    head, dot, rest = sentences[0].partition(". ")
    first = f'<p class="first">{head}{dot.strip()}</p>' + (f'<p class="evidence">{rest}</p>' if rest else "")
    return first + "".join(
        f'<p class="{"caution" if sentence.startswith(("Caution", "The intervals")) else "evidence"}">{sentence}</p>'
        for sentence in sentences[1:]
    )


def with_chips(sentence: str, names: Sequence[str]) -> str:
    """HTML of a sentence with the models' names in bold."""
    text = escape(sentence, quote=False).replace("95 %", "95&nbsp;%")
    longest = sorted((escape(name, quote=False) for name in names), key=len, reverse=True)
    pattern = "|".join(rf"(?<![\w/.-]){re.escape(name)}(?![\w/-])" for name in longest)
    return re.sub(pattern, lambda found: f"<b>{found[0].replace('-', NO_BREAK_HYPHEN)}</b>", text) if pattern else text


# ---------------------------------------------------------------------------------------------------------------------
# Distances


def distances(metrics: dict, names: Sequence[str]) -> str:
    """Tables of each network; those after the first are folded."""
    parts = []
    for index, network in enumerate(metrics["networks"]):
        body = network_part(metrics, network, names)
        heading = f"{escape(network['label'])}"
        remark = "" if network["independent"] else " · not independent, so no verdict rests on it"
        if index == 0:
            parts.append(f"<h3>{heading}<small>{remark}</small></h3>{body}")
        else:
            parts.append(folded(f"{heading}<small>{remark}</small>", body))
    meaning = "".join(f"<dt>{escape(each.label)}</dt><dd>{escape(each.meaning)} {each.better.title()} is better.</dd>"
                      for each in MEASURES.values())  # fmt: skip
    parts.append(folded("What the measures mean", f"<dl>{meaning}</dl>"))
    lead = ("How far each model's pictures are from the real ones, as a network for images sees both. "
            "The last row compares one half of the real pictures with the other half: no model can be expected to do "
            "better.")  # fmt: skip
    return section("distances", "Distance to the real pictures", lead, "".join(parts))


def network_part(metrics: dict, network: dict, names: Sequence[str]) -> str:
    """Values and differences by one network."""
    rows = [row for row in metrics["distances"] if row["network"] == network["name"]]
    head = ["", *(measure.label for measure in MEASURES.values())]

    def cells(values: dict) -> list[str]:
        return [number(values.get(key), measure.decimals) for key, measure in MEASURES.items()]

    lines = [[chip(names, row["model"]) + f"<small>{at(row['guidance'])}</small>", *cells(row)] for row in rows]
    if network.get("floor"):
        lines.append(['<span class="chip">real, half against half</span>', *cells(network["floor"])])
    told = network is verdict_network(metrics) or not network.get("warning")  # the verdict has its own
    warning = "" if told else f'<p class="caution">{escape(network["warning"])}</p>'
    size = f'<p class="note">{network["dims"]:,} features; {metrics["real"]["pictures"]:,} real pictures.</p>'
    values = table(head, lines, "numbers", f"Distances by {network['label']}")
    own = [row for row in metrics["differences"] if row["network"] == network["name"]]
    return warning + values + size + differences(own, names, network["label"]) + copies(rows, names)


def differences(rows: Sequence[dict], names: Sequence[str], label: str) -> str:
    """Differences of each pair with their intervals."""
    reach = {}
    for row in rows:
        ends = [abs(row[end]) for end in ("low", "value", "high") if is_finite(row[end])]
        reach[row["metric"]] = max([reach.get(row["metric"], 0.0), *ends])
    parts = []
    for a, b in pairs_of(rows):
        lines = [difference_line(row, names, reach) for row in rows if (row["a"], row["b"]) == (a, b)]
        head = ["", "difference", "95 % interval", "", "better"]
        caption = f"Differences of {b} minus {a} by {label}"
        parts.append(f"<h4>{chip(names, b)} minus {chip(names, a)}</h4>{table(head, lines, 'differences', caption)}")
    return "".join(parts)


def difference_line(row: dict, names: Sequence[str], reach: dict[str, float]) -> list[str]:
    """Cells of a difference."""
    measure, name = MEASURES[row["metric"]], winner(row)
    values = [number(row[end], measure.decimals) for end in ("value", "low", "high")]
    drawn = all(is_finite(row[end]) for end in ("low", "value", "high"))
    style = style_of(names, name) if name else "mute"
    bar = interval_bar(row["low"], row["value"], row["high"], reach[row["metric"]], style) if drawn else ""
    outcome = chip(names, name) if name else f'<span class="none">{NONE}</span>'
    first = f"{escape(measure.label)}<small>{at(row['guidance'])}</small>"
    return [first, values[0], f"{values[1]} to {values[2]}", bar, outcome]


def copies(rows: Sequence[dict], names: Sequence[str]) -> str:
    """The memorisation lines, where held-out pictures were given."""
    lines = []
    for row in rows:
        if found := row.get("memorisation"):
            gap = f"{number(found['value'], 2)} ({number(found['low'], 2)} to {number(found['high'], 2)})"
            lines.append([chip(names, row["model"]) + f"<small>{at(row['guidance'])}</small>",
                          number(found["generated"], 2), number(found["held_out"], 2), gap])  # fmt: skip
    if not lines:
        return ""
    head = ["", "generated", "held out", "difference of the means"]
    lead = ('<p class="note">Median distance to the nearest training picture. Generated pictures that lie much nearer '
            "than held-out ones are copies.</p>")  # fmt: skip
    return f"<h4>Memorisation</h4>{lead}{table(head, lines, 'numbers', 'Nearest training pictures')}"


# ---------------------------------------------------------------------------------------------------------------------
# One step, spectrum, captions


def one_step_label(name: str, metrics: dict) -> tuple[str, str, float | None]:
    """(label, meaning, ideal value or None) of a measure of the one-step test, such as "perceptual/NETWORK"."""
    kind, _, rest = name.partition("/")
    label, meaning, ideal = IDEALS.get(kind) or (kind, "", None)
    if kind in ONE_STEP:
        label, meaning = ONE_STEP[kind].label, f"{ONE_STEP[kind].meaning} {ONE_STEP[kind].better.title()} is better."
    if kind == "perceptual":
        rest = network_title(next((each["label"] for each in metrics["networks"] if each["name"] == rest), rest))
    return f"{label}, {rest}" if rest else label, meaning, ideal


def one_step(metrics: dict, names: Sequence[str]) -> str:
    """Charts over the noise levels: values, or differences to the baseline."""
    test = metrics.get("one_step")
    if not test:
        return ""
    keys = list(test["models"][0]["metrics"])
    shown = [key for key in keys if key.partition("/")[0] in ("perceptual", "psnr", "high_frequency", "latent_mse")]
    middle = [key for key in keys if key.startswith("spread/")][:1]
    shown += middle
    charts = "".join(one_step_chart(metrics, test, key, names) for key in shown)
    others = "".join(one_step_chart(metrics, test, key, names) for key in keys if key not in shown)
    rest = folded("Other measures and decoder stages", f'<div class="charts">{others}</div>') if others else ""
    drawn = [each["model"] for each in test["models"]]
    kind = "held-out pictures" if test.get("held_out") else "of the real pictures"
    pick = ""
    if len(drawn) > 1:
        options = [("difference", f"difference to {drawn[0]}"), ("value", "values")]
        pick = choice("one-step", options, "Show", "difference")
    lead = (f"Each model is given {test['pictures']:,} {kind} with fixed noise and estimates them in a "
            "single step. The decoded estimates are compared with the truth. This test is nearly free of chance; "
            "bands are 95 % intervals over pictures.")  # fmt: skip
    body = f'{pick}{legend(names)}<div class="charts">{charts}</div>{rest}'
    mode = "difference" if pick else "value"
    return section("one-step", "One step from noise", lead, f'<div class="one-step" data-mode="{mode}">{body}</div>')


def one_step_chart(metrics: dict, test: dict, key: str, names: Sequence[str]) -> str:
    """Both charts of a measure; the page shows one of them."""
    label, meaning, ideal = one_step_label(key, metrics)
    axis = "log SNR (noise grows to the right)"
    lines = [line_of(each["model"], each["metrics"][key], names) for each in test["models"]]
    value = line_chart(test["levels"], lines, f"{label} by noise level", axis, zero=ideal == 0.0, flip=True)
    relative = []
    first = test["models"][0]["model"]
    for model in [each["model"] for each in test["models"][1:]]:
        rows = [row for row in test["differences"] if (row["a"], row["b"], row["metric"]) == (first, model, key)]
        by_level = {row["level"]: (row["value"], row["low"], row["high"]) for row in rows}
        bands = [by_level.get(level, (None,) * 3) for level in range(len(test["levels"]))]
        relative.append(line_of(model, bands, names))
    difference = ""
    if relative:
        chart = line_chart(test["levels"], relative, f"{label}: difference to {first}", axis, zero=True, flip=True)
        difference = f'<div class="difference">{chart}</div>'
    return (f'<figure><figcaption><b>{escape(label)}</b><small>{escape(meaning)}</small></figcaption>'
            f'{difference}<div class="value">{value}</div></figure>')  # fmt: skip


def line_of(model: str, bands: Sequence[Sequence[float | None]], names: Sequence[str]) -> Line:
    """A `Line` of (mean, low, high) at each position."""
    return Line(model, style_of(names, model), *zip(*bands, strict=True))


def spectrum(metrics: dict, names: Sequence[str]) -> str:
    """Log power and its error by frequency, and sharpness."""
    found = metrics.get("spectrum")
    if not found or not found["models"]:
        return ""
    parts = []
    for guidance in dict.fromkeys(row["guidance"] for row in found["models"]):
        rows = [row for row in found["models"] if row["guidance"] == guidance]
        axis = "spatial frequency (1 is the finest)"
        power = [Line("real", "ink", found["real"])]
        power += [Line(row["model"], style_of(names, row["model"]), row["log_power"]) for row in rows]
        error = [Line(row["model"], style_of(names, row["model"]), row["error"]) for row in rows]
        where = at(guidance)
        figures = [
            ("Log power", line_chart(found["frequencies"], power, f"Log power{where}", axis)),
            ("Log power, model minus real", line_chart(found["frequencies"], error, f"Error{where}", axis, zero=True)),
        ]
        parts += [
            f"<figure><figcaption><b>{label}{where}</b></figcaption>{chart}</figure>" for label, chart in figures
        ]
    lead = ("How much detail the pictures have at each scale: coarse on the left, fine on the right. Below 0 in the "
            "second chart a model lacks detail, above 0 it has too much.")  # fmt: skip
    sharp = [[chip(names, row["model"]) + f"<small>{at(row['guidance'])}</small>", band(row["sharpness"], 3)]
             for row in found["models"] if row.get("sharpness")]  # fmt: skip
    if sharp and found.get("real_sharpness"):
        sharp.append(['<span class="chip">real pictures</span>', band(found["real_sharpness"], 3)])
    sharpness = table(["", "sharpness (95 % interval)"], sharp, "numbers", "Sharpness") if sharp else ""
    body = f'{legend(names, real=True)}<div class="charts two">{"".join(parts)}</div>{sharpness}'
    return section("spectrum", "Power spectrum", lead, body)


def band(values: Sequence[float], decimals: int) -> str:
    """ "1.23 (1.20 to 1.26)"."""
    value, low, high = (number(each, decimals) for each in values)
    return f"{value} <small>({low} to {high})</small>"


def captions(metrics: dict, names: Sequence[str]) -> str:
    """CLIPScore of each model."""
    rows = [[chip(names, row["model"]) + f"<small>{at(row['guidance'])}</small>",
             band((row["value"], row["low"], row["high"]), 2)] for row in metrics.get("clip_score") or []]  # fmt: skip
    if not rows:
        return ""
    lead = f"How well pictures and captions agree, by {escape(str(metrics['settings'].get('clip_model')))}."
    return section("captions", "Agreement with the captions", lead,
                   table(["", "CLIPScore (95 % interval)"], rows, "numbers", "CLIPScore"))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def pictures(metrics: dict, names: Sequence[str], folder: Path) -> str:
    """Pairs of pictures, those first where the models differ most; a hover, a tap or a key swaps them."""
    chosen, shown = [], {}
    for pair in metrics.get("pairs") or []:
        guidance = pair.get("guidance")
        if shown.get(guidance, 0) < MOST_PAIRS:
            shown[guidance] = shown.get(guidance, 0) + 1
            chosen.append(pair)
    paths = {pair["real"] for pair in chosen} | {path for pair in chosen for path in pair["pictures"].values()}
    images = thumbnails(folder, paths)
    places = [each for each in shown]
    figures = "".join(figure(pair, names, images, pair.get("guidance") != places[-1]) for pair in chosen)
    if not figures:
        return ""
    controls = []
    if len(places) > 1:
        options = [(f"{each:g}", f"{each:g}") for each in places]
        controls.append(choice("guidance", options, "Guidance", options[-1][0]))
    if len(names) > 2:
        options = [(str(index), name) for index, name in enumerate(names)]
        controls += [choice("first", options, "Show", "0"), choice("second", options, "On hover", "1")]
    if len(names) > 1:
        controls.append('<button type="button" class="all" aria-pressed="false">Swap all <kbd>S</kbd></button>')
    count, total = max(shown.values()), metrics["settings"]["captions"]
    lead = (
        "Captions of the real pictures, one sample each, the same seed for all models."
        + (
            " Pictures where the models differ most come first. Hover over a picture, tap it, or press Enter on it to "
            "see the other model's."
            if len(names) > 1
            else ""
        )
        + (f" The page has {count:,} of {total:,}." if count < total else "")
    )
    body = f'<div class="controls">{"".join(controls)}</div><div class="pairs">{figures}</div>'
    return section("pictures", "Pictures", lead, body)


def figure(pair: dict, names: Sequence[str], images: dict[str, str], hidden: bool) -> str:
    """A real picture beside those of the models; nothing where a file is missing."""
    own = [(name, images.get(pair["pictures"].get(name, ""))) for name in names]
    if pair["real"] not in images or not any(uri for _, uri in own):
        return ""
    caption = pair.get("caption") or pair["stem"]
    text = escape(caption)
    layers = "".join(
        f'<img data-model="{index}" class="{"on" * (index == 0)}" loading="lazy" alt="{escape(name)}: {text}" '
        f'src="{uri}">'
        for index, (name, uri) in enumerate(own)
        if uri
    )
    guidance = "" if pair.get("guidance") is None else f"{pair['guidance']:g}"
    return (
        f'<figure class="pair" data-guidance="{guidance}"{" hidden" * hidden}><div class="frames">'
        f'<button type="button" class="frame flip" aria-pressed="false" aria-label="Swap models: {text}">{layers}'
        '<span class="tag" aria-live="polite"></span></button>'
        f'<div class="frame"><img loading="lazy" alt="Real picture: {text}" src="{images[pair["real"]]}">'
        f'<span class="tag">real</span></div></div><figcaption title="{text}">{text}</figcaption></figure>'
    )


def thumbnails(folder: Path, paths: Iterable[str]) -> dict[str, str]:
    """{path: data URI} of the pictures that can be read, as large as the page's size allows."""
    opened = {}
    for path in sorted(paths):
        try:
            with Image.open(folder / path) as image:
                opened[path] = image.convert("RGB")
        except OSError:
            continue
    made: dict[str, bytes] = {}
    for side in SIDES:
        made = {path: thumbnail(image, side) for path, image in opened.items()}
        if sum(map(len, made.values())) <= PICTURE_BYTES:
            break
    return {path: "data:image/webp;base64," + base64.b64encode(data).decode() for path, data in made.items()}


def thumbnail(image: Image.Image, side: int) -> bytes:
    """WebP bytes of an image, at most `side` px wide and high."""
    small, content = image, io.BytesIO()
    if max(image.size) > side:
        small = image.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(content, "WEBP", quality=82, lossless=small is image and max(image.size) <= PIXELATED, method=4)
    return content.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# How it was made


def making(metrics: dict) -> str:
    """Settings, times, command."""
    settings = metrics["settings"] | {"device": metrics["device"]}
    rows = [[escape(words(key)), escape(shown_value(value))] for key, value in settings.items() if value is not None]
    lead = ("One sample for each caption. Distances compare features of pictures cut to the same size. Intervals "
            "of means are a bootstrap over pictures, those of distances a jackknife or an exchange.")  # fmt: skip
    body = table(["", ""], rows, "plain", "Settings")
    if metrics.get("seconds"):
        times = [[escape(stage), duration(seconds)] for stage, seconds in metrics["seconds"].items()]
        body += f"<h4>Time of this start</h4>{table(['', ''], times, 'plain', 'Time of each stage')}"
    body += f"<h4>Command</h4><pre>{escape(metrics['command'])}</pre>"
    return section("making", "How this was made", lead, body)


def words(key: str) -> str:
    """A flag's name in words."""
    return key.replace("_", " ")


def shown_value(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """ "1 h 02 min", "3 min 20 s", "4.2 s"."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{seconds:.1f} s"

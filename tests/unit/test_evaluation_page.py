"""The page of an evaluation: what is in it, and that a browser opens it, on a desk and on a phone."""

import html
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from lpl_finetuning.evaluation import report
from lpl_finetuning.evaluation.charts import Line, line_chart, nice_ticks
from lpl_finetuning.evaluation.report import duration, facts, write_report
from lpl_finetuning.evaluation.verdict import verdict_sentences
from tests import children
from tests.synthetic_metrics import draw_pictures, metrics_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NAMES = ("without-lpl", "with <b>lpl</b>")
VOID = {"meta", "link", "img", "input", "br"}


def written(folder, names=NAMES, count=3, **options):
    """A report of made-up metrics; its path."""
    guidance = options.get("guidance", (1.0, 3.0))
    pairs = draw_pictures(folder, [re.sub(r"\W", "", name) for name in names], guidance, count)
    metrics = metrics_of(names, pairs=pairs, **options)
    for pair in metrics["pairs"]:
        pair["pictures"] = dict(zip(names, pair["pictures"].values(), strict=True))
    metrics["verdict"] = verdict_sentences(metrics)
    return write_report(metrics, folder)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return written(tmp_path_factory.mktemp("report"))


class Elements(HTMLParser):
    """The elements of a page; an element that is not closed is an error."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_the_page_is_whole_and_loads_nothing_from_elsewhere(page):
    text = page.read_text(encoding="utf-8")
    elements = Elements(text)
    for _, attributes in elements.found:
        for key in ("src", "href", "srcset", "action"):
            assert attributes.get(key, "data:").startswith("data:")
    assert "url(" not in text and "@import" not in text and "http" not in re.sub(r"data:[^\"]*", "", text)
    identities = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(set(identities)) == len(identities)


def test_fewer_captions_than_pictures_are_told():
    metrics = metrics_of(NAMES)
    assert "captions" not in facts(metrics)
    metrics["settings"]["captions"] = 48
    assert facts(metrics).startswith("96 real pictures · 48 captions · guidance")


def test_names_and_captions_are_texts(page):
    """Angle brackets of a model's name or of a caption do not become elements."""
    text = page.read_text(encoding="utf-8")
    assert "with <b>lpl</b>" not in text and "a <ball>" not in text
    assert "a &lt;ball&gt; &amp; its shadow" in text


def test_every_picture_has_a_text_and_every_chart_a_title(page):
    elements = Elements(page.read_text(encoding="utf-8"))
    pictures = elements.all("img")
    assert len(pictures) == 2 * 3 * 3 and all(picture["alt"].endswith("shadow") for picture in pictures)
    charts = [svg for svg in elements.all("svg") if svg["class"] == "chart"]
    assert len(charts) > 10 and all(svg["role"] == "img" and svg["aria-label"] for svg in charts)
    assert all(svg["aria-hidden"] == "true" for svg in elements.all("svg") if svg["class"] != "chart")


def test_the_verdict_comes_before_the_tables_and_the_settings_are_told(page):
    text = page.read_text(encoding="utf-8")
    parts = ("pictures are closer", "Distance to the real", "One step from noise", "Power spectrum",
             "Agreement with", 'id="pictures"', 'id="making"')  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    for part in ("96 real pictures", "guidance 1 and 3", "25 steps", "One sample for each caption", "1,280 features",
                 "96 pictures are few", "python evaluate_models.py", "3 min 42 s", "half against half"):  # fmt: skip
        assert part in text, part


def test_a_difference_that_is_none_is_called_none(tmp_path):
    text = written(tmp_path, effect=0.5).read_text(encoding="utf-8")
    rows = re.findall(r"<tr>.*?</tr>", text)
    assert sum('<span class="none">none</span>' in row for row in rows) == 2 * 2 * 6
    assert "closer to the real ones" not in text


def test_numbers_that_are_not_finite_reach_the_page_and_the_file(tmp_path):
    metrics = metrics_of(NAMES)
    metrics["distances"][0]["recall"] = float("nan")
    metrics["differences"][0] |= {"low": float("nan"), "high": float("inf"), "verdict": "none"}
    metrics["one_step"]["models"][0]["metrics"]["psnr"][3] = [float("nan")] * 3
    path = write_report(metrics, tmp_path)
    Elements(path.read_text(encoding="utf-8"))
    kept = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert kept["distances"][0]["recall"] is None and kept["differences"][0]["high"] is None


def test_parts_that_were_not_measured_are_left_out(tmp_path):
    metrics = metrics_of(("a",)) | {"one_step": None, "clip_score": [], "clip_differences": [], "spectrum": None}
    text = write_report(metrics, tmp_path).read_text(encoding="utf-8")
    for part in ('id="one-step"', 'id="captions"', 'id="spectrum"', 'id="pictures"'):
        assert part not in text


def test_many_large_pictures_are_made_smaller(tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        pixels = np.random.default_rng(0).integers(0, 255, (400, 300, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    size = sum(map(len, report.thumbnails(tmp_path, ["a.png", "b.png"]).values()))
    monkeypatch.setattr(report, "PICTURE_BYTES", size // 3)
    images = report.thumbnails(tmp_path, ["a.png", "b.png"])
    assert len(images) == 2 and sum(map(len, images.values())) < size / 2


def test_a_picture_that_is_missing_or_damaged_does_not_end_the_report(tmp_path):
    page = written(tmp_path, count=3)
    kept = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    first, second, *_ = kept["pairs"]
    (tmp_path / first["real"]).unlink()
    (tmp_path / second["pictures"][NAMES[0]]).write_bytes(b"no picture")
    page = write_report(kept, tmp_path)
    assert page.read_text(encoding="utf-8").count('class="pair"') == 5


def test_small_pictures_are_kept_without_loss(tmp_path):
    [row] = draw_pictures(tmp_path, ["a"], (1.0,), 1)
    data = report.thumbnail(Image.open(tmp_path / row["real"]), 384)
    (tmp_path / "small.webp").write_bytes(data)
    same = Image.open(tmp_path / "small.webp").convert("RGB").tobytes()
    assert same == Image.open(tmp_path / row["real"]).convert("RGB").tobytes()


def test_ticks_are_round_and_span_the_values():
    for low, high in ((0, 1), (-0.0031, 0.0007), (12.2, 20.8), (5, 5), (0, 0), (-7e5, 1e6)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 9
    chart = line_chart([1, 2, 3], [Line("a", "c0", [0.1, None, 0.3])], "chart", "x")
    assert chart.count("<title>") == 2 and "nan" not in chart


def test_durations_are_in_words():
    assert [duration(seconds) for seconds in (4.24, 200, 3720)] == ["4.2 s", "3 min 20 s", "1 h 02 min"]


def luminance(colour):
    """Relative luminance of #rgb or #rrggbb, by WCAG 2."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_stand_out_from_their_ground(scheme):
    """At least 4.5 to 1, the AA level of WCAG 2."""
    style = re.findall(r":root \{(.*?)\}", report.TEMPLATE.read_text(encoding="utf-8"), re.DOTALL)[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", style))
    pairs = [(name, ground) for name in ("ink", "soft", *(f"c{n}" for n in range(report.COLOURS)))
             for ground in ("paper", "card")] + [("warn", "warn-paper"), ("ink", "mark")]  # fmt: skip
    for name, ground in pairs:
        light, dark = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

ACTS = """
const page = frame.contentWindow, all = query => [...page.document.querySelectorAll(query)];
const first = all(".pair:not([hidden]) .flip")[0], tag = () => first.querySelector(".tag").textContent;
const point = (kind, type) => first.dispatchEvent(new page.PointerEvent(kind, {pointerType: type, bubbles: true}));
const click = detail => first.dispatchEvent(new page.MouseEvent("click", {detail: detail, bubbles: true}));
const seen = () => [tag(), ...[...first.querySelectorAll("img")].filter(
  image => page.getComputedStyle(image).display !== "none").map(image => image.dataset.model)];
const found = {};
const shown = query => all(query).filter(one => one.getClientRects().length).length;
found.start = seen();
point("pointerenter", "mouse"); found.over = seen();
point("pointerdown", "mouse"); click(1); found.mouseClick = seen();
point("pointerleave", "mouse"); found.left = seen();
click(0); found.key = seen(); found.pressed = first.getAttribute("aria-pressed"); click(0);
point("pointerenter", "touch"); point("pointerdown", "touch"); click(1); found.tap = seen(); click(1);
page.document.dispatchEvent(new page.KeyboardEvent("keydown", {key: "s"})); found.all = seen();
page.document.dispatchEvent(new page.KeyboardEvent("keydown", {key: "s"})); found.again = seen();
found.guidance = all(".pair:not([hidden])").map(pair => pair.dataset.guidance);
const pick = query => { all(query)[0].click(); };
pick('input[name="guidance"][value="1"]');
found.other = all(".pair:not([hidden])").map(pair => pair.dataset.guidance);
found.difference = [shown(".one-step .difference svg"), shown(".one-step .value svg")];
pick('input[name="one-step"][value="value"]');
found.value = [shown(".one-step .difference svg"), shown(".one-step .value svg")];
all("details").forEach(part => { part.open = true; });
found.width = [page.document.documentElement.scrollWidth, page.innerWidth];
found.broken = all("img").filter(image => image.complete && !image.naturalWidth).length;
found.errors = page.errors;
"""


def opened(page, folder, width):
    """What `ACTS` finds in a page in a frame of that width (a window can't be narrower than 500 px)."""
    text = page.read_text(encoding="utf-8").replace(
        "<head>", "<head><script>window.errors = []; addEventListener('error', e => errors.push(e.message));</script>"
    )
    frame = f'<iframe id="frame" style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(text)}"></iframe>'
    acts = "frame.onload = () => { try {" + ACTS + (
        "out.textContent = JSON.stringify(found); } catch (e) { out.textContent = JSON.stringify(String(e)); } };"
    )  # fmt: skip
    (folder / "outer.html").write_text(
        f'<!doctype html><meta charset="utf-8"><pre id="out">nothing</pre>'
        f"{frame}<script>const frame = document.getElementById('frame'), out = document.getElementById('out');{acts}"
        "</script>", encoding="utf-8",
    )  # fmt: skip
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
             "--window-size=1400,1000", "--virtual-time-budget=10000", "--dump-dom",
             (folder / "outer.html").as_uri()]  # fmt: skip
    dom = children.run(words, text=True, timeout=120).stdout
    return json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_opens_the_page_and_swaps_pictures(page, tmp_path, width):
    found = opened(page, tmp_path, width)
    a, b = [[name, str(number)] for number, name in enumerate(NAMES)]
    assert found["errors"] == [] and found["broken"] == 0
    assert found["start"] == a and found["over"] == found["mouseClick"] == b and found["left"] == a
    assert found["key"] == b and found["pressed"] == "true" and found["tap"] == b
    assert found["all"] == b and found["again"] == a
    assert found["guidance"] == ["3"] * 3 and found["other"] == ["1"] * 3
    assert found["difference"][0] > 4 and found["difference"][1] == 0 == found["value"][0] and found["value"][1] > 4
    assert found["width"][0] <= found["width"][1] == width, "the page scrolls sideways"

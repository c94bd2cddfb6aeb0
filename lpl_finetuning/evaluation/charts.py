"""Charts of the report as inline SVG: lines with bands, and intervals on one scale.

Colours are CSS classes of `report.html` (`c0`, `c1`, … for the models, `ink` for real pictures), so that one file
suits light and dark screens. Every chart has a title for screen readers, and every point tells its value on hover.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 216  # of a chart, in units that the page scales to the width at hand
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34
TICKS = 5
MOST_DOTS = 12  # positions of a line that are marked


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: label for hovering.
        style: CSS class of its colour.
        mean: values, one per position; NaN or None leaves a gap.
        low, high: ends of the intervals; empty without a band.
    """

    name: str
    style: str
    mean: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


def is_finite(value: float | None) -> bool:
    """Whether a value of the metrics can be drawn and printed."""
    return value is not None and math.isfinite(value)


def nice_ticks(low: float, high: float, wanted: int = TICKS) -> list[float]:
    """Round numbers that span an interval, about `wanted` of them."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / (wanted - 1)
    unit = 10 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_text(value: float, step: float) -> str:
    """A tick's number, with as many decimals as the step needs."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) + (
        abs(step * 10 ** -math.floor(math.log10(step)) - 2.5) < 1e-6
    )
    text = f"{value:,.{decimals}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else f"{0:.{decimals}f}"


def line_chart(
    x: Sequence[float], lines: Sequence[Line], title: str, x_label: str, zero: bool = False, flip: bool = False
) -> str:
    """SVG of lines over common positions.

    Args:
        x: positions, ascending or descending.
        lines: at least one.
        title: what the chart shows, for screen readers.
        x_label: below the axis.
        zero: draw the line y = 0, and keep it in sight.
        flip: the largest x stands on the left.
    """
    values = [v for line in lines for part in (line.mean, line.low, line.high) for v in part if is_finite(v)]
    values += [0.0] * zero
    if not values:
        return '<p class="note">No values.</p>'
    ticks = nice_ticks(min(values), max(values))
    bottom, top, step = ticks[0], ticks[-1], ticks[1] - ticks[0]
    first, last = (max(x), min(x)) if flip else (min(x), max(x))

    def across(value: float) -> float:
        return LEFT + (value - first) / ((last - first) or 1) * (WIDTH - LEFT - RIGHT)

    def down(value: float) -> float:
        return TOP + (top - value) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in ticks:
        style = "axis" if zero and abs(tick) < step * 1e-6 else "rule"
        parts.append(f'<path class="{style}" d="M{LEFT} {down(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{down(tick) + 3.5:.1f}" text-anchor="end">{tick_text(tick, step)}</text>'
        )
    parts += _x_axis(first, last, across, x_label)
    parts += [_band(x, line, across, down) for line in lines]
    parts += [part for line in lines for part in _curve(x, line, across, down)]
    return "".join(parts) + "</svg>"


def _x_axis(first, last, across, label) -> list[str]:
    low, high = min(first, last), max(first, last)
    ticks = [tick for tick in nice_ticks(low, high) if low - 1e-9 <= tick <= high + 1e-9]
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    base = HEIGHT - BOTTOM
    parts = [
        f'<text x="{across(tick):.1f}" y="{base + 14}" text-anchor="middle">{tick_text(tick, step)}</text>'
        for tick in ticks
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    return [*parts, f'<text class="label" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(label)}</text>']


def _runs(x, *columns):
    """Stretches of finite values: lists of (x, values…)."""
    run = []
    for row in zip(x, *columns, strict=True):
        if all(map(is_finite, row)):
            run.append(row)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _band(x, line, across, down) -> str:
    if not len(line.low):
        return ""
    bands = []
    for run in _runs(x, line.low, line.high):
        upper = [f"{across(at):.1f} {down(high):.1f}" for at, _, high in run]
        lower = [f"{across(at):.1f} {down(low):.1f}" for at, low, _ in reversed(run)]
        bands.append(f'<path class="band {line.style}" d="M{"L".join(upper + lower)}Z"/>')
    return "".join(bands)


def _curve(x, line, across, down) -> list[str]:
    parts = []
    for run in _runs(x, line.mean):
        points = [f"{across(at):.1f} {down(value):.1f}" for at, value in run]
        parts.append(f'<path class="line {line.style}" d="M{"L".join(points)}"/>')
    bounds = list(zip(line.low, line.high, strict=True)) if len(line.low) else [None] * len(x)
    for at, value, bound in zip(x, line.mean, bounds, strict=True):
        if is_finite(value):
            text = f"{line.name}: {value:.4g}" + (f" ({bound[0]:.4g} to {bound[1]:.4g})" if bound else "")
            place = f'cx="{across(at):.1f}" cy="{down(value):.1f}"'
            dot = f'<circle class="dot {line.style}" {place} r="2.2"/>' if len(x) <= MOST_DOTS else ""
            parts.append(f'{dot}<circle class="aim" {place} r="7"><title>{escape(text)}</title></circle>')
    return parts


def interval_bar(low: float, value: float, high: float, reach: float, style: str) -> str:
    """SVG of an interval around a dot, on a scale from -reach to reach with a mark at 0.

    Args:
        low, value, high: the interval.
        reach: the largest distance from 0 on the scale.
        style: CSS class of the colour.
    """
    width, height = 200, 18

    def across(number: float) -> float:
        return width / 2 + max(-1.0, min(1.0, number / (reach or 1.0))) * (width / 2 - 6)

    middle = height / 2
    return (
        f'<svg class="interval" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f'<path class="rule" d="M4 {middle}H{width - 4}"/><path class="axis" d="M{width / 2} 1V{height - 1}"/>'
        f'<path class="stroke {style}" d="M{across(low):.1f} {middle}H{across(high):.1f}"/>'
        f'<circle class="dot {style}" cx="{across(value):.1f}" cy="{middle}" r="4"/></svg>'
    )

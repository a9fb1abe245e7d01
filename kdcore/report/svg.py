"""Small inline SVG plots: no library, no script, the page's colours, the same text for the same numbers.

A plot is drawn 360 units wide, so that its letters stay readable when it fills a phone. Colours come from the
page's style sheet by class (one per role, ``c0`` to ``c3`` within a role), so that the dark mode has its own.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kdcore.report.text import MINUS, ROLE_NAMES

WIDTH, HEIGHT = 360, 256
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 40
LETTER = 6.5  # mean width of a letter at the plots' 12 px
VARIANTS = 4

Number = Callable[[float], str]


@dataclass(frozen=True)
class Style:
    """How one model looks in every plot: ``role`` gives the colour, ``variant`` dashes and marker."""

    role: str
    variant: int

    @property
    def css(self) -> str:
        """The classes of the style sheet; a role it does not know, as data may hold, looks like a baseline."""
        role = self.role if self.role in ROLE_NAMES else "baseline"
        return f"{role.replace('_', '-')} v{self.variant % VARIANTS}"


@dataclass(frozen=True)
class Mark:
    """A labelled point: ``y`` with ``low`` and ``high`` as whiskers where they are known."""

    label: str
    style: Style
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A curve of ``points`` (x, y)."""

    label: str
    style: Style
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels with its ticks; ``log`` is base 10."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of ``value``."""
        low, high, at = (
            (math.log10(self.low), math.log10(self.high), math.log10(value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round values inside the range, four to seven of them where that can be."""
        return _log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high)


def esc(text: object) -> str:
    """Escape what comes from data, for text and for attributes."""
    return html.escape(str(text), quote=True)


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """Return the range of ``values`` with a margin; never of width zero."""
    low, high = min(values), max(values)
    flat = high - low < 1e-12 * max(abs(low), abs(high), 1e-300)
    margin = (abs(low) * 0.05 or 1.0) if flat else share * (high - low)
    return low - margin, high + margin


def tick_text(ticks: Sequence[float]) -> list[str]:
    """Return the ticks with just the decimals that tell them apart."""
    if len(ticks) < 2:
        return [f"{tick:g}" for tick in ticks]
    decimals = max(0, -math.floor(math.log10(min(b - a for a, b in itertools.pairwise(ticks))) + 1e-9))
    if decimals > 6 or max(map(abs, ticks)) >= 1e6:
        return [f"{tick:.3g}" for tick in ticks]
    return [f"{tick:,.{decimals}f}".replace("-", MINUS) for tick in ticks]


def line_plot(title: str, description: str, lines: Sequence[Line], x_label: str) -> str:
    """Draw curves; the y axis is logarithmic where positive values span a factor of 50 or more."""
    values = [y for line in lines for _, y in line.points]
    positions = [x for line in lines for x, _ in line.points]
    log = min(values) > 0 and max(values) / min(values) >= 50
    y_range = (min(values) / 1.15, max(values) * 1.15) if log else padded(values)
    x_low, x_high = min(positions), max(positions)
    x_range = (x_low, x_high) if x_high > x_low else (x_low - 0.5, x_high + 0.5)
    x_axis = Axis(*x_range, LEFT, WIDTH - RIGHT)
    y_axis = Axis(*y_range, HEIGHT - BOTTOM, TOP, log)
    whole = [tick for tick in x_axis.ticks if abs(tick - round(tick)) < 1e-9]
    parts = [_frame(x_axis, y_axis, x_label, whole)]
    for line in lines:
        pixels = [(x_axis(x), y_axis(y)) for x, y in line.points]
        css = line.style.css
        shape = (
            _marker(*pixels[0], line.style)
            if len(pixels) == 1
            else f'<polyline class="curve {css}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)}"/>'
        )
        parts.append(f"<g><title>{esc(line.label)}</title>{shape}</g>")
    return _svg(title, description, "".join(parts))


def scatter_plot(title: str, description: str, marks: Sequence[Mark], x_label: str, x_number: Number) -> str:
    """Draw labelled points on a logarithmic x axis, with whiskers where ``low`` and ``high`` are known."""
    spread = [value for mark in marks for value in (mark.y, mark.low, mark.high) if value is not None]
    x_axis = Axis(min(mark.x for mark in marks) / 1.6, max(mark.x for mark in marks) * 1.6, LEFT, WIDTH - RIGHT, True)
    y_axis = Axis(*padded(spread, 0.1), HEIGHT - BOTTOM, TOP)
    parts = [_frame(x_axis, y_axis, x_label, None, x_number)]
    boxes = [(x_axis(mark.x) - 6, y_axis(mark.y) - 6, x_axis(mark.x) + 6, y_axis(mark.y) + 6) for mark in marks]
    for mark in marks:
        x, y = x_axis(mark.x), y_axis(mark.y)
        whisker = ""
        if mark.low is not None and mark.high is not None:
            whisker = _whisker(x, y_axis(mark.low), x, y_axis(mark.high), mark.style)
        label = _place(_short(mark.label, 22), x, y, boxes)
        note = esc(f"{mark.label}: {mark.note}")
        parts.append(f"<g><title>{note}</title>{whisker}{_marker(x, y, mark.style)}{label}</g>")
    return _svg(title, description, "".join(parts))


def interval_plot(title: str, description: str, marks: Sequence[Mark], x_label: str) -> str:
    """Draw one row a mark: its ``x`` with the interval ``low`` to ``high``, and a line at zero."""
    row, top = 38, 6
    height = top + row * len(marks) + BOTTOM
    spread = [0.0, *(value for mark in marks for value in (mark.x, mark.low, mark.high) if value is not None)]
    axis = Axis(*padded(spread), 14, WIDTH - 14)
    floor = height - BOTTOM
    parts = [_x_axis(axis, floor, top, x_label, None, None, 14, WIDTH - 14)]
    parts.append(f'<line class="zero" x1="{axis(0):.1f}" x2="{axis(0):.1f}" y1="{top}" y2="{floor}"/>')
    for position, mark in enumerate(marks):
        y = top + row * position + 26
        whisker = ""
        if mark.low is not None and mark.high is not None:
            whisker = _whisker(axis(mark.low), y, axis(mark.high), y, mark.style)
        name = _short(mark.label, int((WIDTH - 36) / LETTER) - len(mark.note))
        text = (
            f'<rect class="behind" x="12" y="{y - 24}" width="{LETTER * len(name) + 6:.1f}" height="15"/>'
            f'<rect class="behind" x="{WIDTH - 16 - LETTER * len(mark.note):.1f}" y="{y - 24}" '
            f'width="{LETTER * len(mark.note) + 6:.1f}" height="15"/>'
            f'<text class="label" x="14" y="{y - 12}">{esc(name)}</text>'
            f'<text class="tick" text-anchor="end" x="{WIDTH - 14}" y="{y - 12}">{esc(mark.note)}</text>'
        )
        note = esc(f"{mark.label}: {mark.note}")
        parts.append(f"<g><title>{note}</title>{whisker}{_marker(axis(mark.x), y, mark.style)}{text}</g>")
    return _svg(title, description, "".join(parts), height)


def category_plot(
    title: str, description: str, categories: Sequence[tuple[str, str]], marks: Sequence[Mark], x_label: str
) -> str:
    """Draw marks over named categories (name, second line); ``mark.x`` is the category's position in the list.

    Marks of one label are joined by a line: the categories are taken to be ordered.
    """
    spread = [value for mark in marks for value in (mark.y, mark.low, mark.high) if value is not None]
    y_axis = Axis(*padded(spread), HEIGHT - BOTTOM - 12, TOP)
    x_axis = Axis(-0.5, len(categories) - 0.5, LEFT, WIDTH - RIGHT)
    parts = [_y_axis(y_axis)]
    room = (WIDTH - LEFT - RIGHT) / len(categories)
    letters = max(3, int(room / LETTER))
    for index, (name, second) in enumerate(categories):
        x, y = x_axis(index), HEIGHT - BOTTOM + 4.0
        parts.append(
            f"<g><title>{esc(name)}</title>{_text('tick', x, y, _short(name, letters))}"
            f"{_text('tick faint', x, y + 13, _short(second, letters))}</g>"
        )
    parts.append(_text("axis", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x_label))
    labels = list(dict.fromkeys((mark.label, mark.style) for mark in marks))
    step = min(9.0, 0.5 * room / max(1, len(labels)))
    for place, (label, style) in enumerate(labels):
        shift = step * (place - (len(labels) - 1) / 2)
        own = sorted((mark for mark in marks if mark.label == label and mark.style == style), key=lambda mark: mark.x)
        pixels = [(x_axis(mark.x) + shift, y_axis(mark.y)) for mark in own]
        if len(pixels) > 1:
            parts.append(
                f'<polyline class="curve thin {style.css}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)}"/>'
            )
        for mark, (x, y) in zip(own, pixels, strict=True):
            whisker = ""
            if mark.low is not None and mark.high is not None:
                whisker = _whisker(x, y_axis(mark.low), x, y_axis(mark.high), style)
            note = esc(f"{label}, {categories[int(mark.x)][0]}: {mark.note}")
            parts.append(f"<g><title>{note}</title>{whisker}{_marker(x, y, style)}</g>")
    return _svg(title, description, "".join(parts))


def swatch(style: Style, line: bool) -> str:
    """Return the sample of a style for a legend; hidden from readers that hear the label."""
    stroke = f'<polyline class="curve {style.css}" points="1,7 25,7"/>' if line else ""
    return (
        f'<svg class="swatch" viewBox="0 0 26 14" width="26" height="14" aria-hidden="true" focusable="false">'
        f"{stroke}{'' if line else _marker(13, 7, style)}</svg>"
    )


def _svg(title: str, description: str, body: str, height: int = HEIGHT) -> str:
    label = esc(f"{title}. {description}")
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">'
        f"<title>{esc(title)}</title><desc>{esc(description)}</desc>{body}</svg>"
    )


def _frame(
    x_axis: Axis, y_axis: Axis, x_label: str, x_ticks: Sequence[float] | None, x_number: Number | None = None
) -> str:
    return _y_axis(y_axis) + _x_axis(
        x_axis, HEIGHT - BOTTOM, TOP, x_label, x_ticks, x_number, LEFT, WIDTH - RIGHT, grid=False
    )


def _y_axis(axis: Axis) -> str:
    ticks = axis.ticks
    texts = [f"{tick:g}" for tick in ticks] if axis.log else tick_text(ticks)
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axis(tick):.1f}" y2="{axis(tick):.1f}"/>'
        f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{axis(tick) + 4:.1f}">{esc(text)}</text>'
        for tick, text in zip(ticks, texts, strict=True)
    )


def _x_axis(
    axis: Axis,
    floor: float,
    top: float,
    label: str,
    ticks: Sequence[float] | None,
    number: Number | None,
    left: float,
    right: float,
    grid: bool = True,
) -> str:
    shown = axis.ticks if ticks is None else ticks
    texts = [number(tick) for tick in shown] if number else tick_text(shown)
    parts = [f'<line class="base" x1="{left}" x2="{right}" y1="{floor}" y2="{floor}"/>']
    for tick, text in zip(shown, texts, strict=True):
        x = axis(tick)
        start = top if grid else floor
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{start}" y2="{floor + 4}"/>'
            f"{_text('tick', x, floor + 17, text)}"
        )
    parts.append(_text("axis", (left + right) / 2, floor + 34, label))
    return "".join(parts)


def _text(css: str, x: float, y: float, text: str) -> str:
    return f'<text class="{css}" text-anchor="middle" x="{x:.1f}" y="{y:.1f}">{esc(text)}</text>'


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 3:
            step = math.ceil(len(inside) / 6)
            return inside[::step]
    return inside or [math.sqrt(low * high)]


def _whisker(x1: float, y1: float, x2: float, y2: float, style: Style) -> str:
    flat = abs(y1 - y2) < 1e-9
    a, b = (0.0, 4.0) if flat else (4.0, 0.0)
    return (
        f'<path class="whisker {style.css}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}'
        f'M{x1 - a:.1f} {y1 - b:.1f}L{x1 + a:.1f} {y1 + b:.1f}M{x2 - a:.1f} {y2 - b:.1f}L{x2 + a:.1f} {y2 + b:.1f}"/>'
    )


def _marker(x: float, y: float, style: Style) -> str:
    css = f'class="marker {style.css}"'
    shape = style.variant % VARIANTS
    if shape == 0:
        return f'<circle {css} cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    if shape == 1:
        return f'<rect {css} x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    if shape == 2:
        return f'<path {css} d="M{x:.1f} {y - 5:.1f}L{x + 5:.1f} {y + 4:.1f}H{x - 5:.1f}Z"/>'
    return (
        f'<path {css} d="M{x:.1f} {y - 5.5:.1f}L{x + 5.5:.1f} {y:.1f}L{x:.1f} {y + 5.5:.1f}L{x - 5.5:.1f} {y:.1f}Z"/>'
    )


def _place(text: str, x: float, y: float, boxes: list[tuple[float, float, float, float]]) -> str:
    """Return the label at the first place around the point that is free, and nothing if none is."""
    width = LETTER * len(text)
    places = [(x + 9, y + 4), (x - 9 - width, y + 4)]
    places += [(x - width / 2, y + dy) for dy in (-9, 17, -21, 29)]
    places += [(x + dx, y + dy) for dx in (7, -7 - width) for dy in (-9, 17, -21, 29)]
    for left, base in places:
        box = (left, base - 9, left + width, base + 2)
        inside = box[0] >= LEFT and box[2] <= WIDTH - 2 and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
        if inside and not any(_overlap(box, other) for other in boxes):
            boxes.append(box)
            return f'<text class="label halo" x="{left:.1f}" y="{base:.1f}">{esc(text)}</text>'
    return ""


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: max(1, letters - 1)] + "\N{HORIZONTAL ELLIPSIS}"

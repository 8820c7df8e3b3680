"""Line charts, histograms and heat maps as inline SVG."""

from __future__ import annotations

import math
from html import escape


# About as wide as it is shown, on a phone and in a column of a wide screen, so that text keeps its size.
WIDTH, HEIGHT = 360, 206
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 16, 24
_MOST_POINTS = 400
# Of an axis, relative to its numbers: less is no change that is worth a look.
_LEAST_SPAN = 5e-3
_NUM_COLORS = 6

Points = list[tuple[float, float]]


def line_chart(label: str, series: list[tuple[str, Points]], log: bool = False) -> str:
    """Lines over steps, one for each (name, points); points that are not finite are left out. "" without any.

    Args:
        log: a logarithmic y axis, without points at 0 and below.
    """
    series = [(name, _drawable(points, log)) for name, points in series]
    if not any(points for _, points in series):
        return ""
    axes = _Axes([point for _, points in series for point in points], log)
    parts = axes.parts("step")
    for number, (name, points) in enumerate(series):
        if not points:
            continue
        color = f"c{number % _NUM_COLORS}"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(axes.place, _thinned(points)))
        parts.append(f'<polyline class="line {color}" points="{path}"><title>{escape(name)}</title></polyline>')
        x, y = axes.place(points[-1])
        parts.append(f'<circle class="dot {color}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    return _svg(label, HEIGHT, parts)


def histogram(label: str, x_label: str, top: float, series: list[tuple[str, list[float]]]) -> str:
    """Shares of what lies in equal bins of [0, top], in outline, one for each (name, shares). "" without any."""
    series = [(name, shares) for name, shares in series if any(shares)]
    if not series:
        return ""
    axes = _Axes([(0.0, 0.0), (top, max(max(shares) for _, shares in series))])
    parts = axes.parts(x_label)
    for number, (name, shares) in enumerate(series):
        width = top / len(shares)
        corners = [(0.0, 0.0)]
        for i, share in enumerate(shares):
            corners += [(i * width, share), ((i + 1) * width, share)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(axes.place, [*corners, (top, 0.0)]))
        color = f"c{number % _NUM_COLORS}"
        parts.append(f'<polygon class="area {color}" points="{path}"><title>{escape(name)}</title></polygon>')
    return _svg(label, HEIGHT, parts)


def heat_map(label: str, unit: str, rows: list[str], columns: list[str], values: dict[tuple[str, str], float]) -> str:
    """A cell for each (row, column) that has a finite value, darker where larger. "" without any."""
    values = {place: value for place, value in values.items() if math.isfinite(value)}
    if not values:
        return ""
    top = max(values.values()) or 1.0
    left = 12 + 7 * max(len(row) for row in rows)
    longest = max(len(column) for column in columns)
    head = 16 + round(4.6 * longest)
    # A label that leans to the right needs room behind the last column.
    cell_width = max(10, min(40, (WIDTH - left - 4.6 * longest) / len(columns)))
    cell_height = 16 if len(rows) <= 40 else 8
    parts = []
    for j, column in enumerate(columns):
        x = left + (j + 0.5) * cell_width
        parts.append(f'<text x="{x:.1f}" y="{head - 6}" transform="rotate(-45 {x:.1f} {head - 6})">')
        parts.append(f"{escape(column)}</text>")
    for i, row in enumerate(rows):
        y = head + i * cell_height
        if cell_height >= 16 or i % 4 == 0:
            parts.append(f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{escape(row)}</text>')
        for j, column in enumerate(columns):
            if (row, column) in values:
                value = values[row, column]
                parts.append(
                    f'<rect class="cell" x="{left + j * cell_width:.1f}" y="{y}" width="{cell_width - 2:.1f}" '
                    f'height="{cell_height - 2}" fill-opacity="{0.06 + 0.94 * value / top:.3f}">'
                    f"<title>{escape(row)} {escape(column)}: {value:.3g}{unit}</title></rect>"
                )
    y = head + len(rows) * cell_height + 10
    for i in range(8):
        opacity = 0.06 + 0.94 * i / 7
        parts.append(
            f'<rect class="cell" x="{left + 12 * i}" y="{y}" width="12" height="8" fill-opacity="{opacity:.3f}"/>'
        )
    parts.append(f'<text x="{left - 6}" y="{y + 9}" text-anchor="end">0</text>')
    parts.append(f'<text x="{left + 102}" y="{y + 9}">{top:.3g}{unit}</text>')
    return _svg(label, y + 16, parts, max(WIDTH, round(left + cell_width * len(columns) + 4.6 * longest)))


class _Axes:
    """Where points go, and the lines and numbers around them."""

    def __init__(self, points: Points, log: bool = False) -> None:
        self.log = log
        xs, ys = zip(*points, strict=True)
        self.x0, self.x1 = (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 1, max(xs) + 1)
        heights = [self._height(y) for y in ys]
        low, high = min(heights), max(heights)
        if high - low < (margin := _LEAST_SPAN * max(abs(low), abs(high)) or 1.0) and not log:
            low, high = (low + high - margin) / 2, (low + high + margin) / 2
        self.ticks = _powers(low, high) if log else _ticks(low, high)
        self.y0, self.y1 = min(self.ticks[0], low), max(self.ticks[-1], high)
        size = max(map(abs, self.ticks))
        # Very large and very small numbers get their power of ten once, above the axis.
        self.exponent = 0 if log or 1e-3 <= size < 1e5 else math.floor(math.log10(size))

    def _height(self, y: float) -> float:
        return math.log10(y) if self.log else y

    def place(self, point: tuple[float, float]) -> tuple[float, float]:
        return self._column(point[0]), self._pixel(self._height(point[1]))

    def _column(self, x: float) -> float:
        return _LEFT + (x - self.x0) / (self.x1 - self.x0) * (WIDTH - _LEFT - _RIGHT)

    def _pixel(self, height: float) -> float:
        return HEIGHT - _BOTTOM - (height - self.y0) / (self.y1 - self.y0) * (HEIGHT - _TOP - _BOTTOM)

    def parts(self, x_label: str) -> list[str]:
        parts = []
        if self.exponent:
            parts.append(f'<text x="{_LEFT - 6}" y="10" text-anchor="end">×1e{self.exponent}</text>')
        for tick in self.ticks:
            y = self._pixel(tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{self._text(tick)}</text>')
        y = HEIGHT - _BOTTOM + 16
        for x, anchor in ((self.x0, "start"), (self.x1, "end")):
            text = f"{x:.0f}" if x == round(x) else f"{x:.3g}"
            parts.append(f'<text x="{self._column(x):.1f}" y="{y}" text-anchor="{anchor}">{text}</text>')
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        parts.append(f'<text x="{middle:.0f}" y="{y}" text-anchor="middle">{escape(x_label)}</text>')
        return parts

    def _text(self, tick: float) -> str:
        if self.log:
            if self.ticks[0] > -3 and self.ticks[-1] < 4:
                return f"{10**tick:.4g}"
            return f"{10**tick:.0e}".replace("e-0", "e-").replace("e+0", "e")
        step = (self.ticks[1] - self.ticks[0]) / 10.0**self.exponent
        decimals = next(n for n in range(9) if abs(step * 10**n - round(step * 10**n)) < 1e-6)
        return f"{tick / 10.0**self.exponent + 0.0:.{decimals}f}"


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that enclose [low, high]."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Logarithms of round numbers that enclose [10^low, 10^high]: powers of ten, of few decades also 2 and 5 times."""
    first, last = math.floor(low + 1e-9), math.ceil(high - 1e-9)
    last = max(last, first + 1)
    if last - first <= 2:
        ticks = [decade + math.log10(factor) for decade in range(first, last) for factor in (1, 2, 5)] + [float(last)]
        below = [tick for tick in ticks if tick <= low + 1e-9]
        above = [tick for tick in ticks if tick >= high - 1e-9]
        return [tick for tick in ticks if below[-1] <= tick <= max(above[0], ticks[ticks.index(below[-1]) + 1])]
    return [float(power) for power in range(first, last + 1, -(-(last - first) // 6))]


def _drawable(points: Points, log: bool) -> Points:
    return [point for point in points if all(map(math.isfinite, point)) and (point[1] > 0 or not log)]


def _thinned(points: Points) -> Points:
    """Long series by their extremes, so that a single spike stays in sight."""
    size = -(-len(points) // (_MOST_POINTS // 2))
    if size <= 2:
        return points
    kept = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return kept


def _svg(label: str, height: int, parts: list[str], width: int = WIDTH) -> str:
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    return head + "".join(parts) + "</svg>"

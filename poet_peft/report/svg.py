"""Line charts and heat maps as inline SVG."""

from __future__ import annotations

import math
from html import escape


WIDTH, HEIGHT = 520, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 28

Points = list[tuple[float, float]]


def line_chart(label: str, series: list[tuple[str, Points]]) -> str:
    """Lines over steps, one for each (name, points); points that are not finite are left out. "" without any."""
    series = [(name, [p for p in points if all(map(math.isfinite, p))]) for name, points in series]
    everything = [point for _, points in series for point in points]
    if not everything:
        return ""
    x0, x1 = _range([x for x, _ in everything])
    y0, y1 = _range([y for _, y in everything])

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = _LEFT + (point[0] - x0) / (x1 - x0) * (WIDTH - _LEFT - _RIGHT)
        return x, HEIGHT - _BOTTOM - (point[1] - y0) / (y1 - y0) * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for i in range(5):
        value = y0 + (y1 - y0) * i / 4
        y = place((x0, value))[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for value, anchor in ((x0, "start"), ((x0 + x1) / 2, "middle"), (x1, "end")):
        x = place((value, y0))[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{value:.6g}</text>')
    for number, (name, points) in enumerate(series):
        if not points:
            continue
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, points))
        parts.append(f'<polyline class="line c{number % 6}" points="{path}"><title>{escape(name)}</title></polyline>')
        x, y = place(points[-1])
        parts.append(f'<circle class="dot c{number % 6}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    return _svg(label, WIDTH, HEIGHT, parts)


def heat_map(label: str, rows: list[str], columns: list[str], values: dict[tuple[str, str], float]) -> str:
    """A cell for each (row, column) that has a finite value, darker where larger. "" without any."""
    values = {place: value for place, value in values.items() if math.isfinite(value)}
    if not values:
        return ""
    top = max(values.values()) or 1.0
    left, cell_width, cell_height = 44, max(26, min(60, 476 // max(len(columns), 1))), 18
    height = 92 + cell_height * len(rows)
    parts = []
    for j, column in enumerate(columns):
        x = left + j * cell_width + cell_width / 2
        parts.append(f'<text x="{x}" y="84" transform="rotate(-45 {x} 84)">{escape(column)}</text>')
    for i, row in enumerate(rows):
        y = 92 + i * cell_height
        parts.append(f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{escape(row)}</text>')
        for j, column in enumerate(columns):
            if (row, column) in values:
                value = values[row, column]
                parts.append(
                    f'<rect class="cell" x="{left + j * cell_width}" y="{y}" width="{cell_width - 2}" '
                    f'height="{cell_height - 2}" fill-opacity="{0.06 + 0.94 * value / top:.3f}">'
                    f"<title>{escape(row)} {escape(column)}: {value:.3g}</title></rect>"
                )
    return _svg(label, left + cell_width * len(columns) + 60, height, parts)


def _svg(label: str, width: int, height: int, parts: list[str]) -> str:
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    return head + "".join(parts) + "</svg>"


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.05 or 1.0
        return low - margin, high + margin
    return low, high

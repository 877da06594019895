"""Horizontal bars as SVG, readable on light and on dark pages, without scripts, fonts or anything else from outside.

A panel shows either ratios, each on its own goal's scale, so that one line is the goal of all, or amounts on a
logarithmic scale. A bar ends at the median; a thin line over it goes from the lowest to the highest. Where the scale
has no zero, a dot is the median: how long a bar is would mean nothing.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, LINE, MARGIN = 900, 24, 16
# Where bars begin and end; labels are on the left, figures on the right.
LEFT, RIGHT = 270, 640
TITLE, HEAD, FOOT = 30, 30, 26
# Ratios beyond so many times the goal are cut off, and the bar says so.
MOST = 3.0

_STYLE = (
    "text{font:13px system-ui,-apple-system,Segoe UI,sans-serif;fill:#1f2328}"
    ".title{font-size:16px;font-weight:600}.head{font-weight:600}.small{font-size:11px;fill:#59636e}"
    ".ground{fill:#fff}.track{fill:#eff2f5}.met{fill:#2b7fb8}.missed{fill:#d1762c}.plain{fill:#7a8794}"
    ".spread{stroke:#1f2328;stroke-width:1.5;fill:none}.goal{stroke:#1f2328;stroke-width:1.5;stroke-dasharray:4 3}"
    ".tick{stroke:#d1d9e0}"
    "@media (prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9198a1}.ground{fill:#0d1117}.track{fill:#1c2128}"
    ".met{fill:#4493c8}.missed{fill:#e08b45}.plain{fill:#8b96a3}.spread,.goal{stroke:#e6edf3}.tick{stroke:#3d444d}}"
)


class Bar(NamedTuple):
    """`value` with what it spreads over; `told` stands behind it. `met` is None where there is no goal."""

    label: str
    value: float
    low: float
    high: float
    told: str
    met: bool | None = None


class Missing(NamedTuple):
    """A line without a bar, and why."""

    label: str
    reason: str


class Panel(NamedTuple):
    """`goal`: values are ratios to the goal, which is at 1. Otherwise they are amounts in `unit`, all above 0."""

    head: str
    lines: Sequence[Bar | Missing]
    goal: bool = True
    unit: str = ""

    @property
    def height(self) -> int:
        return HEAD + LINE * len(self.lines) + FOOT


def chart(title: str, panels: Sequence[Panel]) -> str:
    """The picture."""
    height = 2 * MARGIN + TITLE + sum(panel.height for panel in panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title, {chr(34): "&quot;"})}">',
        f'<style>{_STYLE}</style><rect class="ground" width="{WIDTH}" height="{height}"/>',
        _text(MARGIN, MARGIN + 16, title, "title"),
    ]
    y = MARGIN + TITLE
    for panel in panels:
        parts += _panel(panel, y)
        y += panel.height
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, y: int) -> list[str]:
    bars = [line for line in panel.lines if isinstance(line, Bar)]
    place, ticks = _ratios(bars) if panel.goal else _amounts(bars, panel.unit)
    top, bottom = y + HEAD, y + HEAD + LINE * len(panel.lines)
    parts = [_text(MARGIN, y + 20, panel.head, "head")]
    goals: list[str] = []
    for name, value in ticks if bars else ():
        x, kind, lines = place(value), "tick", parts
        if panel.goal and value == 1:
            kind, lines = "goal", goals
        lines.append(f'<line class="{kind}" x1="{x:.1f}" y1="{top - 4}" x2="{x:.1f}" y2="{bottom + 4}"/>')
        parts.append(_text(x, bottom + 17, name, "small", "middle"))
    for number, line in enumerate(panel.lines):
        parts += _line(line, top + LINE * number, place, MOST if panel.goal else math.inf, dot=not panel.goal)
    return parts + goals


def _line(line: Bar | Missing, y: int, place: Callable[[float], float], most: float, *, dot: bool) -> list[str]:
    label = _text(LEFT - 10, y + 17, line.label, "", "end")
    if isinstance(line, Missing):
        return [label, _text(RIGHT + 14, y + 17, f"not run: {line.reason}", "small")]
    kind = {True: "met", False: "missed", None: "plain"}[line.met]
    end, low, high = place(line.value), place(line.low), place(line.high)
    beyond = f'<path class="{kind}" d="M{RIGHT + 1} {y + 5}l6 7.5l-6 7.5z"/>' if line.high > most else ""
    bar = f'<rect class="{kind}" x="{LEFT}" y="{y + 5}" width="{max(end - LEFT, 1):.1f}" height="{LINE - 9}" rx="2"/>'
    point = f'<circle class="{kind}" cx="{end:.1f}" cy="{y + 12.5}" r="4.5"/>'
    return [
        label,
        "" if dot else bar,
        beyond,
        f'<path class="spread" d="M{low:.1f} {y + 8}v9m0 -4.5H{high:.1f}m0 -4.5v9"/>',
        point if dot else "",
        _text(RIGHT + 14, y + 17, line.told),
    ]


def _ratios(bars: Sequence[Bar]) -> tuple[Callable[[float], float], list[tuple[str, float]]]:
    end = min(MOST, max([1.25, *(bar.high * 1.05 for bar in bars)]))
    ticks = [("0", 0.0), ("goal", 1.0), *[(f"{value:g} × goal", float(value)) for value in range(2, int(end) + 1)]]
    return lambda value: LEFT + (RIGHT - LEFT) * min(max(value, 0.0), end) / end, ticks


def _amounts(bars: Sequence[Bar], unit: str) -> tuple[Callable[[float], float], list[tuple[str, float]]]:
    least = math.floor(math.log10(min((bar.low for bar in bars if bar.low > 0), default=1.0)))
    most = max(math.ceil(math.log10(max((bar.high for bar in bars if bar.high > 0), default=10.0))), least + 1)

    def place(value: float) -> float:
        share = (math.log10(value) - least) / (most - least) if value > 0 else 0.0
        return LEFT + (RIGHT - LEFT) * min(max(share, 0.0), 1.0)

    return place, [(f"{10.0**power:g} {unit}", 10.0**power) for power in range(least, most + 1)]


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'

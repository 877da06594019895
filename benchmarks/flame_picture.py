"""Stacks as a flame graph in SVG: the outermost calls at the bottom, each as wide as the share of samples it was in.

(Brendan Gregg, "The flame graph", CACM 59(6), 2016.) No script and nothing from outside: a browser shows the name of a
call and its share where the pointer rests. The colour is that of the part of a step that a call belongs to, so that
the table beside can be found again in the picture.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

WIDTH, LINE, MARGIN, LETTER = 1200, 17, 12, 6.9
# What is narrower than this cannot be seen.
LEAST_WIDTH = 0.6
COLOURS = {
    "HTTP": "#7aa6d8", "parsing": "#8ccbb5", "checking": "#c9c36a", "entry": "#d8a878", "store": "#d98888",
    "applying": "#9fca72", "reply": "#b79ad6", "event loop": "#b4b4b4",
}  # fmt: skip
_STYLE = (
    "text{font:11px ui-monospace,Menlo,Consolas,monospace;fill:#111}"
    ".ground{fill:#fff}.said{fill:#1f2328;font-family:system-ui,sans-serif}.title{font-size:15px;font-weight:600}"
    "@media (prefers-color-scheme:dark){.ground{fill:#0d1117}.said{fill:#e6edf3}}"
)


@dataclass(slots=True)
class Call:
    count: int = 0
    inner: dict[str, "Call"] = field(default_factory=dict)


def render(title: str, stacks: Mapping[tuple[str, ...], int], part_of: Callable[[Sequence[str]], str]) -> str:
    """The picture. `part_of` says of a stack which part it belongs to: a key of COLOURS."""
    root = Call()
    for calls, count in stacks.items():
        _add(root, calls, count)
    depth = _depth(root)
    height = 2 * MARGIN + 3 * LINE + (depth + 1) * LINE
    rects: list[str] = []
    _draw(
        root, (), MARGIN, height - MARGIN - LINE, (WIDTH - 2 * MARGIN) / max(root.count, 1), root.count, rects, part_of
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{_quoted(title)}">'
        f'<style>{_STYLE}</style><rect class="ground" width="{WIDTH}" height="{height}"/>'
    )
    said = f'<text class="said title" x="{MARGIN}" y="{MARGIN + 12}">{escape(title)}</text>'
    return "\n".join([head, said, _legend(), *rects, "</svg>"]) + "\n"


def _add(root: Call, calls: Sequence[str], count: int) -> None:
    root.count += count
    at = root
    for call in calls:
        at = at.inner.setdefault(call, Call())
        at.count += count


def _depth(call: Call) -> int:
    return 1 + max(map(_depth, call.inner.values()), default=0)


def _draw(
    call: Call,
    way: tuple[str, ...],
    x: float,
    y: float,
    scale: float,
    total: int,
    rects: list[str],
    part_of: Callable[[Sequence[str]], str],
) -> None:
    """`way` are the calls from the outermost to this one, `scale` the width of a sample, `total` how many there are."""
    width = call.count * scale
    if width < LEAST_WIDTH:
        return
    name = way[-1] if way else "all"
    told = f"{name}: {100 * call.count / total:.1f} %"
    rects.append(
        f'<g><title>{escape(told)}</title><rect x="{x:.1f}" y="{y:.0f}" width="{width - 0.3:.1f}" height="{LINE - 1}" '
        f'rx="1" fill="{COLOURS[part_of(way)]}"/>{_label(name, x, y, width)}</g>'
    )
    for inner_name, inner in sorted(call.inner.items()):
        _draw(inner, (*way, inner_name), x, y - LINE, scale, total, rects, part_of)
        x += inner.count * scale


def _label(name: str, x: float, y: float, width: float) -> str:
    room = int((width - 6) / LETTER)
    if room < 3:
        return ""
    short = name if len(name) <= room else name[: room - 1] + "…"
    return f'<text x="{x + 3:.1f}" y="{y + 12:.0f}">{escape(short)}</text>'


def _legend() -> str:
    parts, x = [], float(MARGIN)
    for name, colour in COLOURS.items():
        y = MARGIN + LINE + 5
        parts.append(f'<rect x="{x:.0f}" y="{y}" width="11" height="11" rx="2" fill="{colour}"/>')
        parts.append(f'<text class="said" x="{x + 16:.0f}" y="{y + 10}">{name}</text>')
        x += 34 + 7 * len(name)
    return "".join(parts)


def _quoted(text: str) -> str:
    return escape(text, {'"': "&quot;"})

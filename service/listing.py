"""The catalogue for people: as text for a terminal, and as docs/optimizers.md, schedules.md, transforms.md and
reducers.md, where what an old contribution counts is, too.
"""

import difflib
import textwrap
from collections.abc import Iterator
from typing import Any, Final

from service import catalogue

WIDTH: Final = 100

TITLES: Final = {
    "optimizers": "Optimizers",
    "schedules": "Schedules",
    "transforms": "Transforms",
    "reducers": "Reducers",
}
INTRODUCTIONS: Final = {
    "optimizers": """
Every kind that `optimizer` of `POST /v1/sessions` may name, with its defaults: by its name alone, or as an object such
as `{"kind": "adam", "lr": 0.01}`. A name with several published forms is one kind with an option, and the notes say
which library takes which. In the formulas g is the gradient, θ the parameters, η the rate, t the number of the step,
and u what is added to the parameters.

Any number may be a [schedule](schedules.md), unless it is an integer or used before the first step alone;
[transforms](transforms.md) act on the gradient before the optimizer sees it. Bytes per parameter are those of the state
in a float32 session, for a matrix of 1024 × 768. How many steps each kind takes to a minimum is in
[convergence.md](convergence.md), which libraries it agrees with in [agreement.md](agreement.md).
`ravine optimizers KIND` shows the same in a terminal, `GET /v1/optimizers/{kind}` to a program.
""",
    "schedules": """
What may stand in the place of any number of an optimizer or a transform, such as
`{"kind": "linear", "init": 0.5, "end": 0.9, "steps": 500}`. x is the value, t the number of the step, from 1; the first
step is taken at the first value. Past its end a schedule holds its last value.
`GET /v1/sessions/{id}/schedule?steps=100` shows the values to come, before the first step too.
""",
    "transforms": """
What `transforms` of `POST /v1/sessions` may list: they act on the gradient in the order given, before the optimizer,
each on what the one before it made. What one remembers is part of the session's state, under its name in the
checkpoint.
""",
    "reducers": """
What `reduce` of `aggregation` in `POST /v1/sessions` may name: how the contributions of a round become the one gradient
that the optimizer sees, whichever optimizer that is. By its name alone, or as an object such as
`{"kind": "krum", "byzantine": 2}`. n is the number of contributions, g are they, w their weights, f is `byzantine`.
How much an old contribution counts, [`staleness`](#staleness), is below.

`mean` and `sum` take contributions in as they come and hold one gradient, however many workers there are; the others
hold all of them until the round is over. Those that do not weigh count heads: a worker cannot count for more by saying
so.
""",
}
# Member of an entry -> its column in the table at the head of a page.
COLUMNS: Final = {"bytes_per_parameter": "bytes per parameter", "keeps": "gradients held", "least": "contributions ≥"}
STALENESS: Final = """## Staleness

What `staleness` of `aggregation` may name: the factor s of a contribution by its age τ, which is the number of steps
since those parameters that its gradient was taken at (its `base_step`). Without it an old one counts like a new one.
"""


def overview(family: str) -> str:
    """All kinds of a family, a line each."""
    entries = catalogue.FAMILIES[family]()
    lines = list(_lines(entries))
    if family == "reducers":
        lines += ["", "By its age, a contribution counts:", *_lines(catalogue.staleness_entries())]
    return "\n".join([*lines, "", f"ravine {family} KIND tells all about one.", ""])


def _lines(entries: tuple[dict[str, Any], ...]) -> Iterator[str]:
    width = max(len(entry["kind"]) for entry in entries) + 2
    for entry in entries:
        yield f"{entry['kind']:{width}}{_short(entry['summary'], WIDTH - width)}"


def page(family: str, kind: str) -> str:
    """One kind, whole. Raises LookupError with a sentence."""
    beside = catalogue.staleness_entries() if family == "reducers" else ()
    entries = {entry["kind"]: entry for entry in (*catalogue.FAMILIES[family](), *beside)}
    if kind not in entries:
        near = difflib.get_close_matches(kind, entries, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else f"; ravine {family} lists them"
        raise LookupError(f"there is no kind {kind!r} of {family}{hint}")
    entry = entries[kind]
    parts = [kind, "", *_wrapped(entry["description"]), f"  {entry['formula']}", ""]
    rows = list(_members(entry))
    widths = [max(len(row[column]) for row in rows) + 2 for column in (0, 1)] if rows else []
    parts += [f"  {name:{widths[0]}}{default:{widths[1]}}{what}".rstrip() for name, default, what in rows]
    parts += [""] * bool(rows)
    for line in [*(f"{name}: {text}".replace("`", "") for name, text in _facts(entry)), *entry["notes"]]:
        parts += textwrap.wrap(line, WIDTH, initial_indent="- ", subsequent_indent="  ")
    return "\n".join([*parts, "", entry["source"], entry["url"], ""])


def markdown(family: str) -> str:
    """All kinds of a family as a page of docs/."""
    entries = catalogue.FAMILIES[family]()
    made = f"<!-- Made by `make docs` from the declarations in core/. -->\n\n# {TITLES[family]}\n"
    parts = [made + INTRODUCTIONS[family].rstrip() + "\n", *_index(entries), *map(_section, entries)]
    if family == "reducers":
        ages = catalogue.staleness_entries()
        parts += [STALENESS, *_index(ages), *(_section(entry, "###") for entry in ages)]
    return "\n".join(parts)


def _index(entries: tuple[dict[str, Any], ...]) -> Iterator[str]:
    columns = [name for name in COLUMNS if name in entries[0]]
    yield " | ".join(["| kind |", *map(COLUMNS.__getitem__, columns)]) + " |"
    yield "|---|---|" + "---|" * len(columns)
    for entry in entries:
        told = [entry[name]["float32"] if name == "bytes_per_parameter" else entry[name] for name in columns]
        yield " | ".join([f"| [`{entry['kind']}`](#{entry['kind']})", _cell(entry["summary"]), *map(str, told)]) + " |"
    yield ""


def _section(entry: dict[str, Any], level: str = "##") -> str:
    parts = [f"{level} {entry['kind']}", "", entry["description"], "", "```math", entry["formula"], "```", ""]
    rows = list(_members(entry))
    if rows:
        parts += ["| member | default | |", "|---|---|---|"]
        parts += [f"| `{name}` | {default and f'`{default}`'} | {_cell(what)} |" for name, default, what in rows]
        parts.append("")
    parts += [f"- {name}: {text}" for name, text in _facts(entry)]
    parts += [f"- {note}" for note in entry["notes"]]
    parts += [f"- Source: [{entry['source']}]({entry['url']})", ""]
    return "\n".join(parts)


def _members(entry: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, default, what it may be) of each member."""
    schema = entry["schema"]
    for name, member in schema["properties"].items():
        if name != "kind":
            default = "" if name in schema.get("required", ()) else _value(member.get("default"))
            yield name, default, _type(member)


def _value(value: object) -> str:
    if isinstance(value, dict):  # what a wrapper wraps
        return str(value["kind"])
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return f"{value:g}" if isinstance(value, float) else repr(value).replace("'", '"')


def _type(member: dict[str, Any]) -> str:
    """A JSON Schema in few words."""
    if "enum" in member or "const" in member:
        return ", ".join(_value(value) for value in member.get("enum", [member.get("const")]))
    if "anyOf" in member or "oneOf" in member:
        return " or ".join(dict.fromkeys(_type(part) for part in member.get("anyOf") or member["oneOf"]))
    if "$ref" in member:
        kind = member["$ref"].rpartition("/")[2].lower()
        return f"{'an' if kind[0] in 'aeio' else 'a'} {kind}"
    if member.get("type") == "array":
        return f"a list: {_type(member['items'])}" if "items" in member else "a list"
    return f"{member.get('type', 'any')} {', '.join(_bounds(member))}".rstrip()


def _bounds(member: dict[str, Any]) -> Iterator[str]:
    for name, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")):
        if name in member and abs(member[name]) < catalogue.ENDLESS:
            yield f"{sign} {member[name]:g}"


def _facts(entry: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is worth a line, beside the members."""
    for name, label in (("needs", "A step needs"), ("slots", "State per parameter"), ("own", "Other state")):
        if entry.get(name):
            yield label, ", ".join(f"`{item}`" for item in entry[name])
    more = sorted(set(entry.get("may_need", ())) - set(entry.get("needs", ())))
    if more:
        yield "By its options it may also need", ", ".join(f"`{item}`" for item in more)
    if "bytes_per_parameter" in entry:
        size = entry["bytes_per_parameter"]["float32"]
        most = entry.get("bytes_per_parameter_at_most", entry["bytes_per_parameter"])["float32"]
        square = " beside n × n in all" if entry.get("matrices") else ""
        yield "Bytes per parameter", (f"{size}" if size == most else f"{size}, with other options {most}") + square
    yield from _remarks(entry)


def _remarks(entry: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if entry.get("max_parameters"):
        yield "At most", f"{entry['max_parameters']} parameters"
    if entry.get("wraps"):
        yield "Wraps", ", ".join(f"`{kind}`" for kind in entry["wraps"])
    if entry.get("hands_out_points"):
        yield "Points", "the next gradient is to be taken at `at=next`, which is not where the parameters are"
    if entry.get("row_sparse") and "family" in entry:
        yield "Rows", "a row-sparse gradient touches its rows alone"
    if entry.get("bfloat16"):
        yield "bfloat16", "`state_dtype` may be `bfloat16`"
    if "keeps" in entry:
        yield "An open round holds", "one gradient" if entry["keeps"] == "one" else "all its contributions"
        yield "Weights", "count" if entry["weighted"] else "do not count"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _short(text: str, width: int) -> str:
    return textwrap.shorten(text, width, placeholder=" …")


def _wrapped(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        yield from textwrap.wrap(" ".join(paragraph.split()), WIDTH)
        yield ""

"""Schedules of every kind, at random, as they stand in a request; and a request's schedule as the core's object."""

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from core import schedules
from core.schedules import Schedule

Json = dict[str, Any]
Numbers = st.SearchStrategy[float]

factors = st.floats(1e-3, 3.0)
shares = st.floats(1e-3, 1.0)
lengths = st.integers(1, 10**6)
flags = st.booleans()


def schedule_of(settings: Mapping[str, Any]) -> Schedule:
    """`settings` as in a request: {"kind": "linear", "init": …}."""
    fields = {name: _value(value) for name, value in settings.items() if name != "kind"}
    return schedules.KINDS[settings["kind"]](**fields)


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_value(item) for item in value)
    return schedule_of(value) if isinstance(value, Mapping) else value


def ascending(least: int = 1, *, empty: bool = True) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(least, 10**6), min_size=0 if empty else 1, max_size=5, unique=True).map(sorted)


def _kind(kind: str, required: dict[str, Any], **optional: Any) -> st.SearchStrategy[Json]:
    return st.fixed_dictionaries({"kind": st.just(kind), **required}, optional=optional)


@st.composite
def _piecewise_linear(draw: st.DrawFn, numbers: Numbers) -> Json:
    steps = draw(ascending(0, empty=False))
    values = draw(st.lists(numbers, min_size=len(steps), max_size=len(steps)))
    return {"kind": "piecewise_linear", "steps": steps, "values": values}


@st.composite
def _piecewise_constant(draw: st.DrawFn, numbers: Numbers) -> Json:
    boundaries = draw(ascending())
    values = draw(st.lists(numbers, min_size=len(boundaries) + 1, max_size=len(boundaries) + 1))
    return {"kind": "piecewise_constant", "values": values, "boundaries": boundaries}


@st.composite
def _warmup(draw: st.DrawFn, kind: str, numbers: Numbers, **own: Any) -> Json:
    warmup, more = draw(st.integers(0, 10**6)), draw(lengths)
    settings: Json = draw(_kind(kind, {"peak": numbers}, init=numbers, end=numbers, **own))
    settings |= {"warmup_steps": warmup, "steps": warmup + more}
    if kind == "warmup_stable_decay":
        settings["decay_steps"] = min(draw(lengths), more)
    return settings


@st.composite
def _cyclic(draw: st.DrawFn, numbers: Numbers) -> Json:
    found: Json = draw(_kind("cyclic", {"init": numbers, "peak": numbers}, steps_up=lengths, steps_down=lengths))
    mode = draw(st.sampled_from(["triangular", "triangular2", "exp_range"]))
    return found | {"mode": mode} | ({"gamma": draw(shares)} if mode == "exp_range" else {})


@st.composite
def _one_cycle(draw: st.DrawFn, numbers: Numbers) -> Json:
    three = draw(flags)
    found: Json = draw(
        _kind(
            "one_cycle", {"peak": numbers, "steps": lengths, "pct_start": st.floats(0, 0.5 if three else 1)},
            anneal=st.sampled_from(["cos", "linear"]), div_factor=factors, final_div_factor=factors,
        )
    )  # fmt: skip
    return found | {"three_phase": three}


def one_way_kinds(numbers: Numbers) -> dict[str, st.SearchStrategy[Json]]:
    """Those that go one way, from their first value to their last."""
    ends, gone = {"init": numbers, "end": numbers, "steps": lengths}, {"init": numbers, "steps": lengths}
    rates = {"init": numbers, "rate": factors}
    fields: dict[str, tuple[Json, Json]] = {
        "constant": ({"value": numbers}, {}),
        "linear": (ends, {}),
        "polynomial": (ends, {"power": factors}),
        "exponential": (rates, {"steps": lengths, "staircase": flags}),
        "inverse_time": (rates | {"rate": st.floats(0, 1e300)}, {"steps": lengths, "staircase": flags}),
        "step": (gone, {"factor": factors}),
        "multi_step": ({"init": numbers, "milestones": ascending()}, {"factor": factors}),
        "cosine": (gone, {"floor": numbers, "exponent": factors}),
    }
    return {kind: _kind(kind, required, **optional) for kind, (required, optional) in fields.items()}


def simple_kinds(numbers: Numbers) -> dict[str, st.SearchStrategy[Json]]:
    """Those that have neither parts nor a memory."""
    warm, down = {"peak": numbers, "warmup_steps": lengths}, st.sampled_from(["linear", "cosine", "sqrt"])
    restarts = {"mult": st.integers(1, 4), "floor": numbers, "factor": shares}
    return one_way_kinds(numbers) | {
        "inverse_sqrt": _kind("inverse_sqrt", warm, warmup=st.sampled_from(["linear", "constant"])),
        "piecewise_constant": _piecewise_constant(numbers),
        "piecewise_linear": _piecewise_linear(numbers),
        "cosine_restarts": _kind("cosine_restarts", {"init": numbers, "steps": lengths}, **restarts),
        "cyclic": _cyclic(numbers),
        "one_cycle": _one_cycle(numbers),
        "warmup_cosine": _warmup("warmup_cosine", numbers, exponent=factors),
        "warmup_linear": _warmup("warmup_linear", numbers),
        "warmup_stable_decay": _warmup("warmup_stable_decay", numbers, decay=down),
    }


@st.composite
def _sequences(draw: st.DrawFn, inner: st.SearchStrategy[Json]) -> Json:
    boundaries = draw(ascending())
    parts = draw(st.lists(inner, min_size=len(boundaries) + 1, max_size=len(boundaries) + 1))
    return {"kind": "sequence", "parts": parts, "boundaries": boundaries}


def composed_kinds(inner: st.SearchStrategy[Json]) -> dict[str, st.SearchStrategy[Json]]:
    """Those that have parts."""
    return {
        "sequence": _sequences(inner),
        "product": _kind("product", {"parts": st.lists(inner, min_size=1, max_size=4)}),
    }


def closed(numbers: Numbers) -> st.SearchStrategy[Json]:
    """All that have no memory."""
    simple = st.one_of(*simple_kinds(numbers).values())
    return st.recursive(simple, lambda inner: st.one_of(*composed_kinds(inner).values()), max_leaves=8)


def plateau(numbers: Numbers) -> st.SearchStrategy[Json]:
    return _kind(
        "plateau", {"init": numbers},
        factor=st.floats(0, 0.99), patience=st.integers(0, 20), threshold=st.floats(0, 2), cooldown=st.integers(0, 20),
        threshold_mode=st.sampled_from(["rel", "abs"]), mode=st.sampled_from(["min", "max"]), minimum=numbers,
        eps=st.floats(0, 1),
    )  # fmt: skip


numbers = st.floats(-1e6, 1e6)
ONE_WAY_JSON, PLATEAU_JSON = st.one_of(*one_way_kinds(numbers).values()), plateau(numbers)
DRAWN = {*simple_kinds(numbers), *composed_kinds(st.nothing()), "plateau"}
ANY_JSON = closed(numbers) | PLATEAU_JSON

ONE_WAY = ONE_WAY_JSON.map(schedule_of)
CLOSED = closed(numbers).map(schedule_of)
ANY = ANY_JSON.map(schedule_of)

"""The catalogue says of each kind what its class does."""

from typing import Any

import pytest

from core import optimizers, schedules
from service import catalogue
from service.kinds import OPTIMIZERS
from service.wire.json import dumps, loads


@pytest.mark.parametrize(("family", "kinds"), [("optimizers", optimizers.KINDS), ("schedules", schedules.KINDS)])
def test_every_kind_is_listed_and_is_plain_json(family: str, kinds: dict[str, Any]) -> None:
    listed = catalogue.listing(family)
    assert [entry["kind"] for entry in listed["data"]] == list(kinds)
    assert listed["has_more"] is False
    assert loads(dumps(listed)) == listed
    for entry in listed["data"]:
        assert all(entry[name] for name in ("summary", "description", "formula", "source", "url"))
        assert catalogue.entry_of(family, entry["kind"]) == entry


@pytest.mark.parametrize("family", ["transforms", "reducers"])
def test_what_there_is_none_of_is_an_empty_list(family: str) -> None:
    assert catalogue.listing(family) == {"data": [], "has_more": False}


@pytest.mark.parametrize("kind", sorted(optimizers.KINDS))
def test_the_entry_agrees_with_the_optimizer(kind: str) -> None:
    entry, usual = catalogue.entry_of("optimizers", kind), optimizers.KINDS[kind]()
    assert entry["slots"] == list(usual.slots)
    assert entry["matrices"] == list(usual.matrices)
    assert set(entry["needs"]) == usual.needs
    assert entry["bytes_per_parameter"] == {"float32": 4 * len(usual.slots), "float64": 8 * len(usual.slots)}
    defaults = {name: member.get("default") for name, member in entry["schema"]["properties"].items() if name != "kind"}
    assert defaults == {name: getattr(usual, name) for name in defaults}
    assert entry["schema"]["additionalProperties"] is False


def test_slots_that_depend_on_options_are_found() -> None:
    entry = catalogue.entry_of("optimizers", "rmsprop")
    assert (entry["slots"], entry["slots_at_most"]) == (["s"], ["s", "mean", "v"])
    assert entry["bytes_per_parameter_at_most"] == {"float32": 12, "float64": 24}
    assert catalogue.entry_of("optimizers", "adagrad")["matrices_at_most"] == ["G"]


def test_the_schema_has_the_bounds_of_the_declaration() -> None:
    adam = catalogue.entry_of("optimizers", "adam")["schema"]
    number, schedule = adam["properties"]["beta1"]["oneOf"]
    assert number == {"type": "number", "minimum": 0, "exclusiveMaximum": 1}
    assert schedule == {"$ref": "#/$defs/Schedule"}
    assert set(adam["$defs"]["Schedule"]["discriminator"]["mapping"]) == set(schedules.KINDS)
    assert set(OPTIMIZERS) == set(optimizers.KINDS)


def test_an_unknown_kind_is_a_lookup_error() -> None:
    with pytest.raises(LookupError):
        catalogue.entry_of("optimizers", "nope")

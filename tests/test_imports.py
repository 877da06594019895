"""Imports point one way; the table below says which. A module that is not in it fails: give it a place first.

`core` knows nothing of ours. `service` is layered: bytes and arrays, then the store, then the live sessions, then what
a client sees, in two planes that meet in `app` alone.
"""

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "core").rglob("*.py"), *(ROOT / "service").rglob("*.py")])

CORE_PACKAGES = {"numpy", "annotated_types", "numba"}

CORE = {"core", "core.*"}
WIRE = {"service.wire", "service.wire.*"}
# What both planes have of HTTP and its documents.
HTTP = {"service.bodies", "service.http", "service.problems", "service.problem_table"}
# The document that describes all calls, and the pages that show it.
REFERENCE = {
    "service.catalogue",
    "service.examples",
    "service.operation",
    "service.operations",
    "service.components",
    "service.openapi",
    "service.reference",
}

# module -> what of ours it may import. Patterns match whole names; the longest that matches a module is its line.
LAYERS: dict[str, set[str]] = {
    "core": set(),
    "core.*": CORE,
    # What stands alone
    "service": set(),
    "service.errors": CORE,
    "service.settings": {"service.access.hosts", "service.access.rates", "service.tracing"},
    "service.meters": set(),
    "service.metrics": {"service.errors", "service.meters"},
    "service.tracing": {"service.logs", "service.meters"},
    "service.logs": {"service.settings"},
    "service.pages": set(),
    "service.bell": set(),
    "service.memory": set(),
    "service.recycling": CORE,
    "service.privacy": set(),
    "service.valkey": set(),
    "service.embedded": {"service.errors", "service.valkey"},
    "service.ids": {"service.errors"},
    # Bytes, arrays, and what they mean
    "service.wire": CORE | WIRE | {"service.errors"},
    "service.wire.*": CORE | WIRE | {"service.errors"},
    "service.faults": WIRE | {"service.errors"},
    "service.kinds": CORE | {"service.errors", "service.faults"},
    "service.documents": CORE | WIRE | {"service.errors"},
    "service.schemas": CORE
    | WIRE
    | {"service.errors", "service.documents", "service.faults", "service.kinds", "service.privacy"},
    "service.tensors": CORE | WIRE,
    # Redis
    "service.acks": set(),
    "service.link": CORE | {"service.acks", "service.errors"},
    "service.cluster": CORE | {"service.acks", "service.errors", "service.link"},
    "service.failpoints": set(),
    "service.index": set(),
    "service.access": set(),
    "service.access.rights": {"service.index"},
    "service.access.hosts": set(),
    "service.access.keys": {"service.access.rates", "service.access.rights", "service.errors"},
    "service.records": CORE | WIRE | {"service.errors", "service.documents", "service.index", "service.link"},
    "service.bulk": CORE | {"service.errors", "service.records"},
    "service.reading": CORE
    | WIRE
    | {"service.bulk", "service.errors", "service.link", "service.records", "service.recycling"},
    "service.store": CORE
    | WIRE
    | {"service.access.keys", "service.errors", "service.failpoints", "service.index", "service.link"}
    | {"service.acks", "service.cluster", "service.meters"}
    | {"service.reading", "service.records"},
    # What each tenant has and may have
    "service.access.script": {"service.link"},
    "service.access.usage": CORE
    | WIRE
    | {"service.access.script", "service.errors", "service.index", "service.link", "service.records"},
    "service.tenants": CORE
    | {"service.access.usage", "service.errors", "service.ids", "service.records", "service.store"},
    "service.access.rates": set(),
    "service.access.quotas": {"service.admission", "service.errors", "service.http", "service.problems"}
    | {f"service.access.{name}" for name in ("rates", "rights", "script")},
    # Sessions that live: nothing of HTTP
    "service.live": CORE
    | WIRE
    | {"service.ids", "service.tensors", "service.errors", "service.documents", "service.records", "service.store"},
    # What becomes of a change: its place in the queue, its entry, its answer
    "service.answers": CORE | {"service.documents", "service.live"},
    "service.changes": CORE | {"service.errors", "service.documents", "service.live", "service.records"},
    "service.entries": CORE
    | {"service.answers", "service.changes", "service.documents", "service.ids", "service.live", "service.records"}
    | {"service.tensors"},
    # What goes on beside the changes: rounds that are over, snapshots, those who wait, those who look
    "service.deadlines": CORE | {"service.errors", "service.index", "service.store"},
    "service.snapshots": CORE | WIRE | {"service.errors", "service.live", "service.records", "service.store"},
    "service.heads": {"service.errors", "service.live", "service.records", "service.store"},
    "service.loading": CORE | {"service.errors", "service.live", "service.records", "service.store"},
    "service.residents": {
        *("service.errors", "service.heads", "service.live", "service.loading", "service.records", "service.store"),
    },
    "service.waiting": {"service.bell", "service.errors", "service.documents", "service.heads", "service.store"},
    "service.crowd": CORE | {"service.errors", "service.live", "service.privacy"},
    "service.commits": CORE
    | {"service.errors", "service.documents", "service.live", "service.records", "service.store", "service.privacy"}
    | {"service.answers", "service.changes", "service.entries", "service.deadlines", "service.tracing"}
    | {"service.heads"},
    "service.objects": {"service.documents", "service.errors", "service.records"},
    "service.engine": CORE
    | WIRE
    | {"service.errors", "service.documents", "service.ids", "service.index", "service.live", "service.records"}
    | {"service.objects", "service.store", "service.answers", "service.changes", "service.commits", "service.crowd"}
    | {"service.deadlines", "service.snapshots", "service.waiting", "service.tenants", "service.access.usage"}
    | {"service.tracing", "service.loading", "service.residents"},
    # What a client sees
    "service.problem_table": set(),
    "service.problems": CORE | WIRE | {"service.errors", "service.pages", "service.problem_table"},
    "service.admission": {"service.errors"},
    "service.intake": {"service.errors"},
    "service.bodies": CORE
    | WIRE
    | {"service.admission", "service.errors", "service.intake", "service.problems", "service.recycling"},
    "service.outlet": {"service.admission"},
    "service.flow": set(),
    "service.protocol": {"service.admission", "service.flow", "service.intake", "service.outlet", "service.problems"},
    "service.http": WIRE
    | {"service.admission", "service.bodies"}
    | {"service.errors", "service.documents", "service.problems"},
    "service.contributions": CORE | WIRE | {"service.errors", "service.http", "service.tensors"},
    "service.asked": CORE | WIRE | {"service.contributions", "service.documents", "service.http"},
    "service.replies": CORE | WIRE | HTTP | {"service.errors", "service.documents"},
    "service.catalogue": CORE | {"service.kinds", "service.schemas"},
    "service.examples": CORE
    | WIRE
    | {"service.errors", "service.documents", "service.problems", "service.replies", "service.schemas"},
    "service.listing": {"service.catalogue"},
    "service.operation": set(),
    "service.step_operations": {"service.examples", "service.operation"},
    "service.operations": {
        *("service.access.rights", "service.catalogue", "service.examples", "service.operation"),
        "service.step_operations",
    },
    "service.components": {"service.examples", "service.operation"},
    "service.openapi": CORE | REFERENCE | HTTP | {"service.access.rights", "service.kinds", "service.schemas"},
    "service.reference": {"service.openapi", "service.pages", "service.problems"},
    # Before the planes
    "service.access.gate": HTTP
    | {"service.errors", "service.access.hosts", "service.access.keys", "service.access.rights"},
    # The planes
    "service.control": CORE
    | WIRE
    | HTTP
    | REFERENCE
    | {"service.errors", "service.documents", "service.schemas", "service.pages", "service.engine"}
    | {"service.access.rights", "service.metrics"},
    "service.data": CORE
    | REFERENCE
    | WIRE
    | HTTP
    | {"service.errors", "service.documents", "service.contributions", "service.replies", "service.engine"}
    | {"service.access.rights", "service.asked"},
    # Past the planes
    "service.short_way": CORE
    | WIRE
    | HTTP
    | {"service.access.gate", "service.access.quotas", "service.access.rights", "service.admission", "service.asked"}
    | {"service.engine", "service.errors", "service.logs", "service.meters", "service.replies"},
    # Several processes on one port: what passes between them, and who is above them
    "service.workers": set(),
    "service.workers.berth": set(),
    "service.workers.links": set(),
    "service.workers.routing": {
        *("service.admission", "service.outlet", "service.protocol"),
        *("service.workers.berth", "service.workers.links"),
    },
    "service.workers.scrape": {"service.workers.berth"},
    "service.workers.supervisor": {
        *("service", "service.logs", "service.serving", "service.settings", "service.workers.berth"),
    },
    # The one place that constructs things, and what starts it
    "service.app": {"core", "core.*", "service", "service.*"},
    "service.serving": {
        *("service", "service.admission", "service.app", "service.logs", "service.memory", "service.outlet"),
        *("service.protocol", "service.settings", "service.workers.berth", "service.workers.routing"),
    },
    "service.cli": {
        "service",
        "service.memory",
        "service.listing",
        "service.serving",
        "service.settings",
        "service.workers",
        "service.workers.supervisor",
        "service.logs",
        "service.embedded",
        "service.errors",
        "service.commands.*",
    },
    # What the command line does beside `serve`
    "service.commands": set(),
    "service.commands.options": {"service.settings"},
    "service.commands.backup": {
        *("service.commands.opened", "service.commands.options", "service.errors", "service.settings"),
        *("service.store", "service.valkey"),
    },
    "service.commands.keys": {
        *("service.access.keys", "service.access.rates", "service.access.rights", "service.commands.*"),
        *("service.errors", "service.ids", "service.index", "service.settings"),
    },
    "service.inspection": {"service.documents", "service.errors", "service.records", "service.store"},
    "service.commands.sessions": {
        *("service.commands.opened", "service.commands.options", "service.errors", "service.ids", "service.index"),
        *("service.inspection", "service.records", "service.settings", "service.store"),
    },
    "service.commands.opened": {
        *("service.acks", "service.embedded", "service.errors", "service.logs", "service.settings", "service.store"),
        "service.valkey",
    },
    "service.__main__": {"service.cli"},
}

BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "managers", "manager", "dependencies", "misc"}
MOST_LINES = 500

# Not all of sys.stdlib_module_names: the core has no business with sockets, files, clocks and threads.
STANDARD = {
    "bisect",
    "collections",
    "copy",
    "dataclasses",
    "fnmatch",
    "functools",
    "hashlib",
    "importlib",
    "itertools",
    "math",
    "types",
    "typing",
}


def name_of(path: Path) -> str:
    """core/optimizers/adam.py -> core.optimizers.adam; core/optimizers/__init__.py -> core.optimizers."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Full names of all modules imported anywhere in the file, within functions and TYPE_CHECKING too."""
    package = name_of(path).split(".") if path.stem == "__init__" else name_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from service import store` imports service.store.
            yield from (f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names)


MODULES = {name_of(path) for path in SOURCES}


def line_of(module: str) -> str | None:
    """The most particular pattern of the table for `module`."""
    return max((pattern for pattern in LAYERS if fnmatchcase(module, pattern)), key=len, default=None)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    module = name_of(path)
    line = line_of(module)
    assert line is not None, f"{module} has no place in the table of layers"
    ours = {name for name in imports(path) if name.split(".")[0] in ("core", "service", "tests")} - {module}
    wrong = {name for name in ours if not any(fnmatchcase(name, pattern) for pattern in LAYERS[line])}
    assert not wrong, f"{module} must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", [path for path in SOURCES if name_of(path).startswith("core")], ids=name_of)
def test_core_stands_on_numpy_alone(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports(path)} - {"core"} - STANDARD
    assert outside <= CORE_PACKAGES


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_modules_have_names_and_a_size(path: Path) -> None:
    assert not BANNED_NAMES & set(name_of(path).split("."))
    assert len(path.read_text("utf-8").splitlines()) <= MOST_LINES


def test_the_table_says_what_the_design_says() -> None:
    """The planes keep apart, the engine knows nothing of HTTP, the core nothing of the service, nobody the app."""

    def may(module: str, other: str) -> bool:
        return any(fnmatchcase(other, pattern) for pattern in LAYERS[module])

    assert not may("service.control", "service.data")
    assert not may("service.data", "service.control")
    inner = ("answers", "changes", "entries", "deadlines", "snapshots", "waiting", "crowd")
    for module in (
        *("service.live", "service.commits", "service.engine", "service.store", "service.wire.*"),
        *(f"service.{name}" for name in inner),
    ):
        for other in ("control", "data", "app", "schemas", "problems", "http", "cli"):
            assert not may(module, f"service.{other}")
    for module in ("service.store", "service.wire.*", "service.live", *(f"service.{name}" for name in inner)):
        for other in ("engine", "commits"):
            assert not may(module, f"service.{other}")
    assert not any(may("core.*", f"service.{name}") for name in ("errors", "wire", "store"))
    assert {module for module in LAYERS if may(module, "service.app")} == {"service.app", "service.serving"}


def test_every_line_of_the_table_is_of_a_module() -> None:
    for pattern in LAYERS:
        assert any(line_of(module) == pattern for module in MODULES), f"{pattern} is a line for nothing"

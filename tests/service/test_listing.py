"""The catalogue for people: `ravine optimizers`, and the pages of docs/ that are made of it."""

import re
from dataclasses import fields

import pytest

from core import averaging, optimizers, schedules, transforms
from core.aggregation import reducers
from core.aggregation.staleness import STALENESS
from service import listing
from tests.running import ROOT, ravine

FAMILIES = {
    "optimizers": optimizers.KINDS,
    "schedules": schedules.KINDS,
    "transforms": transforms.KINDS,
    "reducers": reducers.KINDS,
}
# What `ravine FAMILY KIND` tells about.
TOLD = FAMILIES | {"reducers": reducers.KINDS | STALENESS}
PAIRS = [(family, kind) for family, kinds in TOLD.items() for kind in kinds]
DECLARED = [cls for kinds in (*TOLD.values(), averaging.KINDS) for cls in kinds.values()]
# Commands of LaTeX that KaTeX and MathJax know, and that occur.
LATEX = {
    "Bigl", "Bigr", "Delta", "Lambda", "Sigma", "alpha", "arg", "bar", "begin", "beta", "big", "cdot", "cos", "cup",
    "delta", "dots", "end", "eta", "frac", "gamma", "hat", "in", "infty", "lVert", "lambda", "langle", "le", "left",
    "leftarrow",
    "lfloor", "ln", "mapsto", "mathcal", "mathrm", "max", "min", "mu", "nabla", "nu", "operatorname", "overline", "phi",
    "pi", "pm", "prod", "psi", "qquad", "quad", "rVert", "rangle", "rfloor", "rho", "right", "sigma", "sqrt", "sum",
    "tau", "text", "tfrac", "theta", "top", "varepsilon",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_in_docs_is_the_one_that_is_made(family: str) -> None:
    """If this fails: make docs."""
    assert (ROOT / "docs" / f"{family}.md").read_text("utf-8") == listing.markdown(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_command_lists_all_kinds(family: str) -> None:
    done = ravine(family)
    assert done.returncode == 0
    listed = [line.split()[0] for line in done.stdout.partition("\n\n")[0].splitlines()]
    assert listed == list(FAMILIES[family])
    assert max(map(len, done.stdout.splitlines())) <= listing.WIDTH


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_a_kind_is_told_whole(family: str, kind: str) -> None:
    told, cls = listing.page(family, kind), TOLD[family][kind]
    for text in (cls.formula, cls.source, cls.url):
        assert text in told
    for note in cls.notes:
        assert " ".join(note.split()) in " ".join(told.split())
    for field in fields(cls):
        assert re.search(rf"^  {field.name} ", told, re.MULTILINE), field.name


def test_defaults_and_bounds_are_told() -> None:
    told = re.sub(" +", " ", listing.page("optimizers", "adam"))
    assert " beta1 0.9 number ≥ 0, < 1 or a schedule\n" in told
    assert ' amsgrad false false, "raw", "corrected"\n' in told
    assert "- State per parameter: m, v\n- Bytes per parameter: 8, with other options 12\n" in told


def test_what_a_round_holds_is_told() -> None:
    assert "- An open round holds: one gradient\n- Weights: count\n" in listing.page("reducers", "mean")
    assert "- An open round holds: all its contributions\n- Weights: do not count\n" in listing.page("reducers", "krum")


def test_staleness_is_told_with_the_reducers() -> None:
    listed = listing.overview("reducers").split("\n\n")[1].splitlines()[1:]
    assert [line.split()[0] for line in listed] == list(STALENESS)
    page = listing.markdown("reducers")
    for kind in STALENESS:
        assert f"\n### {kind}\n" in page
        assert f"[`{kind}`](#{kind})" in page


def test_the_command_prints_the_page() -> None:
    done = ravine("optimizers", "lion")
    assert (done.returncode, done.stdout) == (0, listing.page("optimizers", "lion"))


def test_an_unknown_kind_is_an_error_with_a_suggestion() -> None:
    done = ravine("optimizers", "admw")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no kind 'admw' of optimizers; did you mean adamw" in done.stderr
    assert "ravine transforms lists them" in ravine("transforms", "q").stderr


@pytest.mark.parametrize("cls", DECLARED, ids=lambda cls: cls.kind)
def test_formulas_are_latex(cls: type) -> None:
    formula = cls.formula  # type: ignore[attr-defined]
    assert set(re.findall(r"\\([A-Za-z]+)", formula)) <= LATEX
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", formula):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    assert len(re.findall(r"\\left(?![a-z])", formula)) == len(re.findall(r"\\right(?![a-z])", formula))


@pytest.mark.parametrize("cls", DECLARED, ids=lambda cls: cls.kind)
def test_every_kind_says_where_it_is_from(cls: type) -> None:
    assert cls.url.startswith("https://")  # type: ignore[attr-defined]
    assert len(cls.source) > 5  # type: ignore[attr-defined]
    summary = (cls.__doc__ or "").partition("\n")[0]
    assert summary.endswith(".")
    assert len(summary) > 20

"""The documents say what is: their commands are run, their tables compared with the code, their links followed.

A block marked `sh` or `python` is run as it stands, those of one document in one shell and one interpreter, against a
service of the tests' own: of the text, its address alone is put in. The `text` block behind one is what it prints,
where … stands for anything within a line.
"""

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from typer.core import TyperGroup

from service.cli import cli
from service.problem_table import PROBLEMS
from service.settings import Settings
from tests.running import ROOT, Server

README = ROOT / "README.md"
GUIDE = ROOT / "docs" / "getting-started.md"
COMPRESSION = ROOT / "docs" / "compression.md"
SCALING = ROOT / "docs" / "scaling.md"
DOCUMENTS = sorted([README, *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("benchmarks/*.md")])

needs_shell = pytest.mark.skipif(
    not all(map(shutil.which, ("sh", "curl", "sed"))), reason="needs what the documents ask for: sh, curl, sed"
)


# -- commands ----------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    language: str
    text: str
    expected: str | None  # what stands in the text block behind it
    line: int


_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(document: str) -> list[Block]:
    """The blocks that are run."""
    found = list(_FENCE.finditer(document))
    blocks = []
    for fence, after in itertools.zip_longest(found, found[1:]):
        if fence[1] == "text":
            continue
        expected = after[2] if after is not None and after[1] == "text" else None
        blocks.append(Block(fence[1], fence[2], expected, document[: fence.start()].count("\n") + 2))
    return blocks


def pattern_of(expected: str) -> str:
    return ".*".join(map(re.escape, expected.rstrip("\n").split("…")))


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


SEPARATOR = "-- the next block --"
INTERPRETERS = {
    "sh": (["sh", "-euc"], f"\nprintf '%s\\n' '{SEPARATOR}'\n"),
    "python": ([sys.executable, "-c"], f"\nprint({SEPARATOR!r}, flush=True)\n"),
}


def printed(blocks: list[Block], language: str, directory: Path, addresses: dict[str, str]) -> list[str]:
    """What each of the blocks of `language` prints, run one after the other in `directory`."""
    command, between = INTERPRETERS[language]
    program = between.join(block.text for block in blocks if block.language == language)
    for written, real in addresses.items():
        program = program.replace(written, real)
    process = subprocess.Popen(
        [*command, program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd=directory, env=environment(), start_new_session=True,
    )  # fmt: skip
    try:
        output, messages = process.communicate(timeout=120)
    finally:
        end_services(process, directory)
    assert process.returncode == 0, f"{messages.decode()}\nafter:\n{output.decode()}"
    return output.decode().replace("\r\n", "\n").split(SEPARATOR + "\n")


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAVINE_")}


def end_services(process: subprocess.Popen[bytes], directory: Path) -> None:
    """Nothing that a broken block has started stays behind, its store included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for file in directory.glob("*/data/valkey.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


def compare(blocks: list[Block], outputs: list[str], document: Path) -> None:
    assert len(outputs) == len(blocks)
    for block, output in zip(blocks, outputs, strict=True):
        pattern = pattern_of(block.expected or "")
        assert re.fullmatch(pattern, output.rstrip("\n")), (
            f"{document.name}, line {block.line}: it is said to print\n{block.expected}\nand prints\n{output}"
        )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """As a user would stand in the repository, but that what is written goes elsewhere."""
    for name, place in {"core": ROOT / "core", "service": ROOT / "service", ".venv": Path(sys.prefix)}.items():
        (tmp_path / name).symlink_to(place, target_is_directory=True)
    return tmp_path


def addresses(server: Server) -> dict[str, str]:
    found = {"http://127.0.0.1:8000": server.url}
    for port in ("8001", "8002"):
        free = str(free_port())
        found |= {f"127.0.0.1:{port}": f"127.0.0.1:{free}", f"--port {port}": f"--port {free}"}
    return found


@needs_shell
@pytest.mark.parametrize("document", [README, GUIDE], ids=lambda path: path.name)
def test_commands_print_what_the_document_says(document: Path, server: Server, directory: Path) -> None:
    blocks = [block for block in blocks_of(document.read_text()) if block.language == "sh"]
    assert len(blocks) > 5
    compare(blocks, printed(blocks, "sh", directory, addresses(server)), document)
    assert {path.name for path in directory.iterdir()} == {"core", "service", ".venv"}, "and they clean up"


@pytest.mark.parametrize(
    ("document", "count"), [(GUIDE, 7), (COMPRESSION, 2), (SCALING, 2)], ids=["guide", "compression", "scaling"]
)
def test_python_prints_what_the_document_says(document: Path, count: int, server: Server, directory: Path) -> None:
    blocks = [block for block in blocks_of(document.read_text()) if block.language == "python"]
    assert len(blocks) >= count
    compare(blocks, printed(blocks, "python", directory, addresses(server)), document)


def test_the_walk_through_shows_what_matters() -> None:
    """It could agree with what it prints and yet show nothing."""
    shown = "\n".join(block.expected or "" for block in blocks_of(README.read_text()))
    for evidence in (
        "ses_…",
        '{"step":1,"params":',
        "ravine-step: 2\nravine-step: 2\nravine-replayed: true",
        "204\n204",
    ):
        assert evidence in shown
    assert shown.count('{"step":3,"params":{"w":[0.625,-1.625],"b":0.5}}') == 2, "waited for, and restored"


@pytest.mark.parametrize(
    ("document", "languages"),
    [(README, {"sh"}), (GUIDE, {"sh", "python"}), (COMPRESSION, {"python"})],
    ids=["README.md", GUIDE.name, COMPRESSION.name],
)
def test_every_block_is_run_or_compared(document: Path, languages: set[str]) -> None:
    text = document.read_text()
    fences = re.findall(r"^```(\w*)$", text, re.MULTILINE)
    assert set(fences) == {"text", ""} | languages
    blocks = blocks_of(text)
    assert fences.count("text") == sum(block.expected is not None for block in blocks)


# -- tables ------------------------------------------------------------------------------------------------------------


def rows_of(document: Path) -> list[list[str]]:
    """The cells of all tables' rows, without their backticks; heads and rules among them."""
    lines = [line for line in document.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line[1:-1].split("|")] for line in lines]


def options() -> set[str]:
    """The options of `ravine serve`."""
    command = typer.main.get_command(cli)
    assert isinstance(command, TyperGroup)
    return {option for parameter in command.commands["serve"].params for option in parameter.opts}


def test_settings_are_all_there_with_their_defaults() -> None:
    rows = [row for row in rows_of(ROOT / "docs" / "settings.md") if row[0].startswith("RAVINE_")]
    assert [row[0] for row in rows] == [f"RAVINE_{name.upper()}" for name in Settings.model_fields]
    for (variable, option, default, meaning), (name, field) in zip(rows, Settings.model_fields.items(), strict=True):
        flag = f"--{name.replace('_', '-')}"
        assert option == (flag if flag in options() else "—"), variable
        assert default_of(name, default) == field.default, variable
        assert meaning, variable


def default_of(name: str, text: str) -> object:
    """A default as the table writes it, read as the variable would be."""
    return None if text == "none" else getattr(Settings.model_validate({name: text}), name)


def test_the_table_of_errors_is_that_of_the_service() -> None:
    rows = [row for row in rows_of(ROOT / "docs" / "http.md") if len(row) == 4 and re.fullmatch(r"[45]\d\d", row[0])]
    assert {(int(row[0]), row[1]) for row in rows} == {(entry.status, slug) for slug, entry in PROBLEMS.items()}
    assert len(rows) == len(PROBLEMS)


# -- files -------------------------------------------------------------------------------------------------------------


def files() -> list[Path]:
    """All files of the repository, and those that would be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("not a git repository")
    return [path for name in done.stdout.decode().split("\0")[:-1] if (path := ROOT / name).is_file()]


def anchors(document: Path) -> set[str]:
    """What a heading is called in a link."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        place, _, anchor = link.partition("#")
        if place.startswith(("http://", "https://")):
            continue
        target = document.parent / place if place else document
        assert target.exists(), f"{document.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{document.name} links to {link}"


def test_the_readme_leads_to_every_document() -> None:
    text = README.read_text()
    for document in DOCUMENTS:
        assert document == README or f"({document.relative_to(ROOT)})" in text, document


def map_of_the_code() -> list[Path]:
    """The files that the tables under "Read the code" name, as the reader finds them."""
    named = []
    for row in README.read_text().partition("## Read the code")[2].splitlines():
        if not row.startswith("|"):
            continue
        base = ROOT
        for name in re.findall(r"`([\w/]+\.py)`", row):
            path = next((at for at in (base / name, ROOT / name, ROOT / "service" / name) if at.is_file()), None)
            assert path is not None, f"the README names {name}"
            named.append(path)
            base = path.parent
    return named


def test_the_map_names_every_module_once() -> None:
    modules = [path for top in ("core", "service") for path in (ROOT / top).rglob("*.py")]
    expected = sorted(str(path.relative_to(ROOT)) for path in modules if path.name != "__init__.py")
    assert sorted(str(path.relative_to(ROOT)) for path in map_of_the_code()) == expected


def test_the_readme_names_every_directory() -> None:
    text = README.read_text()
    tops = {path.relative_to(ROOT).parts[0] for path in files() if path.parent != ROOT}
    assert [top for top in sorted(tops) if not top.startswith(".") and f"{top}/" not in text] == []


def banned() -> re.Pattern[bytes]:
    """Hosts that packages come from, and places of one machine; in pieces, so that this file may be looked at, too."""
    hosts = ["pypi" + r"\.org", "python" + r"hosted\.org", "anaconda" + r"\.org", "npmjs" + r"\.", "crates" + r"\.io"]
    indexes = [r"--(?:extra-)?" + "index-url", r"://[^\s/]+(?:/[^\s/]+)*/" + r"simple\b"]
    places = [r"(?<![\w.}>])/" + rf"(?:{place})/" for place in ("work", "root", "home", "Users")]
    return re.compile("|".join([*hosts, *indexes, *places, r"\.\./" + "shared"]).encode())


def test_no_file_names_an_index_or_a_machine() -> None:
    pattern = banned()
    for sample in (
        b"https://pypi" + b".org/simple",
        b"cd /" + b"work/main",
        b"../" + b"shared/notes",
        b"/" + b"home/me/x",
    ):
        assert pattern.search(sample), sample
    found = [(str(path.relative_to(ROOT)), hit[0]) for path in files() if (hit := pattern.search(path.read_bytes()))]
    assert found == []

"""`make fuzz ARGS="--minutes 60"`: the service and its readers under random input for as long as told.

A real service stands for the whole time. In turns, each with a new seed: schemathesis goes through the OpenAPI document
of the service, random stories are told beside the model (test_model.py, with a service of its own, which it kills), and
each reader of bytes is fuzzed by coverage. In the end a table says what was done and found, whether any reply was a
500, and what the memory of the service was at the start, after a warm-up, every few minutes and in the end. The exit
code is 1 if anything was found, or if memory grew by more than 5 % since it was warm (memory.py says what that is).
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import count
from pathlib import Path

from tests.fuzz.api import explore
from tests.fuzz.memory import GROWTH, Growth, touch_every_kind
from tests.fuzz.targets import TARGETS
from tests.running import ROOT, Server, serving

API_SECONDS, READER_SECONDS, STORIES = 90, 10, 40
WARM = 1_000_000  # the warm-up's seed is so far from all others


class Findings:
    """What was done, and what was found; texts go to files in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.done: Counter[str] = Counter()
        self.found: Counter[str] = Counter()
        self._directory = directory

    def add(self, name: str, done: int, *, failed: bool, text: str) -> None:
        self.done[name] += done
        if failed:
            self.found[name] += 1
            place = self._directory / f"{name.replace(' ', '-')}-{self.found[name]}.txt"
            place.write_text(text)
            print(f"{name}: found something, see {place}", flush=True)


def stories(findings: Findings, seed: int) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "tests/fuzz/test_model.py", "-p", "no:cacheprovider"]
    environment = os.environ | {"FUZZ_EXAMPLES": str(STORIES)}
    done = subprocess.run(
        [*command, f"--hypothesis-seed={seed}"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    findings.add("stories", STORIES, failed=done.returncode != 0, text=done.stdout + done.stderr)


def reader(findings: Findings, name: str, seed: int, directory: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz.wire", name, "--seconds", str(READER_SECONDS), "--seed", str(seed)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, errors="replace")
    runs = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    failed = done.returncode != 0 or runs is None
    findings.add(f"reader {name}", int(runs[1]) if runs else 0, failed=failed, text=done.stdout + done.stderr)


def api(findings: Findings, server: Server, seed: int) -> None:
    report = explore(server.url, seed, seconds=API_SECONDS)
    findings.add("calls", report.cases, failed=report.failed or not report.cases, text=report.text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=None, help="where findings are written; a new directory")
    given = parser.parse_args()
    output = given.output or Path(tempfile.mkdtemp(prefix="ravine-fuzz-"))
    output.mkdir(parents=True, exist_ok=True)
    findings = Findings(output)
    deadline = time.monotonic() + 60 * given.minutes
    with serving(output / "data", environment={"RAVINE_JIT": "false"}, fresh=True) as server:
        growth = Growth(server)
        touch_every_kind(server)
        explore(server.url, given.seed + WARM, seconds=API_SECONDS)
        growth.begin()
        for seed in count(given.seed):
            api(findings, server, seed)
            growth.look(findings.done["calls"])
            stories(findings, seed)
            for name in TARGETS:
                if time.monotonic() < deadline:
                    reader(findings, name, seed, output)
            if time.monotonic() >= deadline:
                break
        statuses = Counter(re.findall(r" (\d\d\d) \d+\.\d ms", server.log.read_text(errors="replace")))
    return told(findings, statuses, growth)


def told(findings: Findings, statuses: Counter[str], growth: Growth) -> int:
    print(f"{'what':<24}{'how often':>12}{'found':>8}")
    for name, number in findings.done.items():
        print(f"{name:<24}{number:>12,}{findings.found[name]:>8}")
    print("replies by status: " + ", ".join(f"{status}: {number:,}" for status, number in sorted(statuses.items())))
    print(growth.table())
    failures = sum(number for status, number in statuses.items() if status == "500")
    print(f"500: {failures}; memory of the service: {growth.grown:+.1%} since it was warm, {GROWTH:.0%} are allowed")
    return 1 if findings.found.total() or failures or growth.grown > GROWTH else 0


if __name__ == "__main__":
    sys.exit(main())

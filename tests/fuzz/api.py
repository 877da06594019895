"""schemathesis over the OpenAPI document of a running service: every call, alone and led on by links."""

import os
import re
import subprocess
import sys
from typing import NamedTuple

from tests.running import ROOT

# The stream of events never ends. Of what is left out, a valid body may be refused for what no schema can say (a group
# that matches no tensor), a round is not there in a session without rounds, and keys are tests/http/test_rights.py's.
LEFT_OUT = "positive_data_acceptance,ensure_resource_availability,ignored_auth"
PHASES = "fuzzing,stateful"


class Report(NamedTuple):
    """How many calls were made, and what was said where one was answered otherwise than the document says."""

    cases: int
    failed: bool
    text: str


def explore(url: str, seed: int, *, examples: int | None = None, seconds: int | None = None) -> Report:
    """`examples` for each call, or as many as there is time for in `seconds`."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--phases", PHASES]
    command += ["--exclude-path-regex", "events$", "--exclude-checks", LEFT_OUT, "--request-timeout", "60"]
    command += ["--seed", str(seed), "--generation-database", "none", "--no-color", "--warnings", "off"]
    command += ["--continue-on-failure"]
    if examples is not None:
        command += ["--max-examples", str(examples)]
    if seconds is not None:
        command += ["--max-time", str(seconds)]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "tests.fuzz.hooks"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    cases = re.search(r"^\s+(\d+) generated", done.stdout, re.MULTILINE)
    return Report(int(cases[1]) if cases else 0, done.returncode != 0, done.stdout + done.stderr)

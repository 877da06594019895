"""A bounded share of what `make fuzz` does to the service over HTTP, with a fixed seed."""

import re
from pathlib import Path

from tests.fuzz.api import explore
from tests.running import serving


def test_every_call_answers_as_the_document_says(tmp_path: Path) -> None:
    with serving(tmp_path / "data", environment={"RAVINE_JIT": "false"}) as server:
        report = explore(server.url, seed=5, examples=3)
        assert not report.failed, report.text
        assert report.cases > 60
        assert re.findall(r" (5\d\d) \d+\.\d ms", server.log.read_text()) == []

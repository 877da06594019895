"""The examples against a service that asks for keys."""

import importlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.http.callers import KEYS_ASKED_FOR, add_key
from tests.running import ROOT, serving
from tests.wire import create


@pytest.mark.skipif(not all(map(shutil.which, ("sh", "curl", "awk"))), reason="sh, curl and awk are not all here")
def test_the_examples_send_the_key_that_is_in_the_environment(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAVINE_KEY", raising=False)
    monkeypatch.syspath_prepend(ROOT / "examples")
    client = importlib.import_module("client")
    with serving(data, environment=KEYS_ASKED_FOR) as server:
        text, _ = add_key(server.store_url())
        with server.client(headers={"Authorization": f"Bearer {text}"}) as admin:
            session = create(admin, optimizer="sgd", params={"w": [1.0]})["id"]
        command = ["sh", str(ROOT / "examples" / "ravine.sh"), "sgd", server.url]
        for key, status in (("", 1), (text, 0)):
            environment = os.environ | {"RAVINE_KEY": key}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
            assert done.returncode == status, done.stderr
            assert status == 0 or "unauthenticated" in done.stderr
        path = f"/v1/sessions/{session}"
        with pytest.raises(client.Refused, match="401"):
            client.Ravine(server.url).get(path)
        assert client.Ravine(server.url, key=text).get(path)["id"] == session
        monkeypatch.setenv("RAVINE_KEY", text)
        assert client.Ravine(server.url).get(path)["id"] == session

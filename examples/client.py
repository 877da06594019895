"""A worker's side of Ravine: what to copy into a program of your own. The standard library, and NumPy for arrays.

`Session.pull` gets the parameters, `Session.contribute` sends what the worker found and gets the next ones. Both go on
through a service that is restarted, a connection that breaks, a store that is away: a contribution has an
`Idempotency-Key` of its own, and whatever is not answered is sent again with the same bytes and the same key, so that
it counts once. Tensors travel as safetensors, which is eight bytes of length, a header in JSON, and the numbers.
"""

import http.client
import itertools
import json
import os
import random
import struct
import time
import uuid
from dataclasses import dataclass
from email.message import Message
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

import numpy as np

Tensors = dict[str, np.ndarray]

SAFETENSORS = "application/vnd.safetensors"
WAIT_SECONDS = 20  # how long one call waits for a round, at most 60; then it asks again
TIMEOUT_SECONDS = WAIT_SECONDS + 10
PATIENCE_SECONDS = 120  # how long a service may be away
PAUSE_SECONDS = 0.025  # it doubles with each failure, up to the longest
LONGEST_PAUSE_SECONDS = 5.0
AGAIN = {408, 429, 502, 503, 504, 507}


class Refused(Exception):
    """The service said no: its status, and its problem document (RFC 9457)."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        super().__init__(f"{status} {problem.get('type')}: {problem.get('detail')}")
        self.status = status
        self.problem = problem


class Unreachable(Exception):
    """The service did not answer for as long as was waited."""


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Message
    body: bytes


class Point(NamedTuple):
    """Parameters, and the step that they are of: what a contribution from here names as its `base_step`."""

    step: int
    params: Tensors


class Ravine:
    """A service by its URL, over a connection that is kept open, and opened anew when it breaks.

    `key` is what `ravine keys create` gave; left out, the variable RAVINE_KEY, if there is one.
    """

    def __init__(self, url: str, patience: float = PATIENCE_SECONDS, key: str | None = None) -> None:
        self.url = url
        key = os.environ.get("RAVINE_KEY") if key is None else key
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._patience = patience
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not the URL of a service: {url}")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname, parts.port, timeout=TIMEOUT_SECONDS)
        self._prefix = parts.path.rstrip("/")

    def call(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Reply:
        """Sends until there is an answer: so only what may be sent twice. A worker that is too far ahead of the others
        waits for them, no longer than for a service that is away. Raises Refused, Unreachable.
        """
        deadline = time.monotonic() + self._patience
        attempts = 0
        while True:
            attempts += 1
            ahead = None
            pause = min(PAUSE_SECONDS * 2**attempts, LONGEST_PAUSE_SECONDS)
            pause *= random.uniform(0.5, 1)  # or all workers would come back at once
            try:
                reply = self._send(method, path, body, headers or {})
            except (OSError, http.client.HTTPException) as error:
                failure = repr(error)
            else:
                ahead = reply if is_too_far_ahead(reply) else None
                again = ahead or reply.status in AGAIN or (reply.status == 500 and attempts == 1)
                if not again:
                    return accepted(reply)
                failure = str(reply.status)
                pause = max(pause, asked_pause(reply))
            if time.monotonic() + pause > deadline:
                if ahead is not None:
                    return accepted(ahead)  # which raises: the others are slow, the service is there
                raise Unreachable(f"{method} {path}: {failure}, after {attempts} attempts")
            time.sleep(pause)

    def once(self, method: str, path: str, content: object) -> Any:
        """A call that must not be sent twice, such as the one that makes a session. JSON in, JSON out."""
        headers = {"Content-Type": "application/json"}
        return json.loads(accepted(self._send(method, path, json.dumps(content).encode(), headers)).body)

    def get(self, path: str) -> Any:
        return json.loads(self.call("GET", path).body)

    def _send(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Reply:
        try:
            self._connection.request(method, self._prefix + path, body or None, self._headers | headers)
            answer = self._connection.getresponse()
            return Reply(answer.status, answer.headers, answer.read())
        except BaseException:
            self._connection.close()  # half an answer would be taken for the next one's
            raise


class Session:
    """One session of a service, as `worker` sees it."""

    def __init__(self, ravine: Ravine, path: str, worker: str) -> None:
        self._ravine = ravine
        self._path = path
        self._worker = worker

    def poll(self, after: int, wait: float) -> Point | None:
        """The parameters as soon as there is a step behind `after`; None if there is none for `wait` seconds."""
        return self._params({"after": after, "wait": wait})

    def pull(self, after: int | None = None) -> Point:
        """The parameters: those of now, or of a step behind `after`, however long it takes."""
        found = self._params({}) if after is None else None
        while found is None:
            found = self.poll(after or 0, WAIT_SECONDS)
        return found

    def _params(self, query: dict[str, float]) -> Point | None:
        # Where delays are compensated the service remembers what it gave to whom; elsewhere the name does nothing.
        named = urlencode(query | ({"worker": self._worker} if self._worker else {}))
        reply = self._ravine.call("GET", f"{self._path}/params?{named}", headers={"Accept": SAFETENSORS})
        return None if reply.status == 304 else point(reply)

    def contribute(self, payload: str, tensors: Tensors, **members: float) -> Point:
        """Sends "gradients" or "deltas", waits for the round that they go into, and returns where the session is then.

        `members` are such as `base_step`, `weight` and `loss`. Raises Refused: with status 409 when a contribution
        comes too late, is not from what this worker pulled last, or is its second one to a round.
        """
        query = urlencode({"payload": payload, "worker": self._worker, **members})
        headers = {
            "Content-Type": SAFETENSORS,
            "Idempotency-Key": uuid.uuid4().hex,
            "Prefer": f"wait={WAIT_SECONDS}",
        }
        reply = self._ravine.call("POST", f"{self._path}/steps?{query}", dump(tensors), headers)
        if reply.status == 202:  # it is in the round, and safe there; the others take their time
            return self.pull(after=json.loads(reply.body)["round"] - 1)
        return point(reply)


def accepted(reply: Reply) -> Reply:
    if reply.status < 400:
        return reply
    try:
        raise Refused(reply.status, json.loads(reply.body))
    except ValueError:  # what answered is no Ravine
        raise Refused(reply.status, {"detail": reply.body.decode(errors="replace")}) from None


def is_too_far_ahead(reply: Reply) -> bool:
    return reply.status == 409 and b'"/problems/too-far-ahead"' in reply.body


def asked_pause(reply: Reply) -> float:
    """Seconds; a date, which proxies may send, is no reason to wait longer than usual."""
    text = reply.headers.get("Retry-After", "")
    return float(text) if text.isdigit() else 0.0


def point(reply: Reply) -> Point:
    return Point(int(reply.headers["Ravine-Step"]), load(reply.body))


def dump(tensors: Tensors) -> bytes:
    """A safetensors file of float32."""
    arrays = {name: np.ascontiguousarray(tensor, "<f4") for name, tensor in tensors.items()}
    ends = list(itertools.accumulate(array.nbytes for array in arrays.values()))
    header = {
        name: {"dtype": "F32", "shape": array.shape, "data_offsets": [end - array.nbytes, end]}
        for (name, array), end in zip(arrays.items(), ends, strict=True)
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(array.tobytes() for array in arrays.values())


def load(file: bytes) -> Tensors:
    """The tensors of a safetensors file of float32, as sessions answer unless they were opened in another `dtype`."""
    (length,) = struct.unpack_from("<Q", file)
    header = json.loads(file[8 : 8 + length])
    header.pop("__metadata__", None)
    numbers = memoryview(file)[8 + length :]
    return {
        name: np.frombuffer(numbers[slice(*entry["data_offsets"])], "<f4").reshape(entry["shape"])
        for name, entry in header.items()
    }

"""What a client in another language would do: requests, and tensors by the safetensors library."""

from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np
import safetensors.numpy

SAFETENSORS = {"Content-Type": "application/vnd.safetensors"}


def create(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """A new session; its object."""
    reply = client.post("/v1/sessions", json=body)
    assert reply.status_code == 201, reply.text
    made: dict[str, Any] = reply.json()
    return made


def step(
    client: httpx.Client, session: str, gradients: Mapping[str, np.ndarray], headers: Mapping[str, str] | None = None
) -> httpx.Response:
    """One step by safetensors, whatever its outcome."""
    body = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in gradients.items()})
    return client.post(f"/v1/sessions/{session}/steps", content=body, headers=SAFETENSORS | dict(headers or {}))


def tensors(reply: httpx.Response) -> dict[str, np.ndarray]:
    """The tensors of a reply that must have gone well."""
    assert reply.status_code == 200, reply.text
    loaded: dict[str, np.ndarray] = safetensors.numpy.load(reply.content)
    return loaded


def params(client: httpx.Client, session: str, at: str = "next") -> dict[str, np.ndarray]:
    accept = {"Accept": "application/vnd.safetensors"}
    return tensors(client.get(f"/v1/sessions/{session}/params", params={"at": at}, headers=accept))


def bits(array: np.ndarray) -> bytes:
    return array.tobytes()

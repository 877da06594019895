"""Tenants of a service: keys and clients for them, and how they are told that they have enough."""

import contextlib
import itertools
import re
from collections.abc import Iterator
from typing import Any

import httpx
import redis

from service.access.keys import new_key
from service.access.rights import Scope
from tests.http.refusals import refused
from tests.running import Server

ADAM = {"optimizer": "adam", "params": {"w": [1.0, 2.0]}}

tenants = map("tenant-{}".format, itertools.count())


@contextlib.contextmanager
def store_of(server: Server) -> Iterator[Any]:
    with contextlib.closing(redis.Redis.from_url(server.store_url(), decode_responses=True, protocol=2)) as opened:
        yield opened


def key_of(server: Server, tenant: str, scope: Scope = "admin", rate: str | None = None) -> str:
    """A key as `ravine keys create` makes one, as the header that brings it."""
    text, key = new_key(tenant, scope, rate=rate)
    fields = {name: "" if value is None else str(value) for name, value in key._asdict().items() if name != "id"}
    with store_of(server) as store:
        store.hset(f"ravine:key:{key.id}", mapping=fields)
    return f"Bearer {text}"


@contextlib.contextmanager
def client_of(server: Server, tenant: str | None = None, **key: Any) -> Iterator[httpx.Client]:
    """A client of a tenant that nobody else uses."""
    header = key_of(server, tenant or next(tenants), **key)
    with server.client(headers={"Authorization": header}) as client:
        yield client


def exceeded(reply: httpx.Response, quota: str, limit: int) -> httpx.Headers:
    document = refused(reply, 429, "quota-exceeded")
    assert (document["quota"], document["limit"]) == (quota, limit)
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.headers["ratelimit-policy"]
    return reply.headers


def standing(reply: httpx.Response) -> dict[str, tuple[int, int]]:
    """By policy: what is left, and of how many."""
    left = dict(re.findall(r'"(\w+)";r=(\d+)(?:;t=\d+)?(?:, |$)', reply.headers["ratelimit"]))
    limits = dict(re.findall(r'"(\w+)";q=(\d+);w=\d+(?:, |$)', reply.headers["ratelimit-policy"]))
    assert left.keys() == limits.keys()
    return {name: (int(left[name]), int(limits[name])) for name in limits}

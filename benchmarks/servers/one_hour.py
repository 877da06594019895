"""What one would write in an hour: FastAPI, a pydantic model, and the state as JSON in Redis.

    python -m benchmarks.servers.one_hour DIRECTORY

It is given all that costs nothing to give: uvloop, httptools and hiredis; a pool of connections over a unix socket; the
embedded Valkey with the settings that the service runs it with; pydantic's own JSON for the state, which is
faster than the standard library's. As such code is, it takes no lock: two steps of one session at once lose one.
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import numpy as np
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from redis.asyncio import Redis

from benchmarks.servers.serving import run
from service.embedded import Embedded

store: Redis


class State(BaseModel):
    step: int
    lr: float
    params: list[float]
    m: list[float]
    v: list[float]


class NewSession(BaseModel):
    params: list[float]
    lr: float = 1e-3


class Step(BaseModel):
    gradients: dict[str, list[float]]


class Created(BaseModel):
    id: str


class Stepped(BaseModel):
    step: int
    params: dict[str, list[float]]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    global store
    embedded = Embedded(Path(sys.argv[1]))
    await embedded.start()
    store = Redis.from_url(embedded.url, protocol=2)
    yield
    await store.aclose()
    await embedded.stop()


app = FastAPI(lifespan=lifespan)


@app.post("/sessions")
async def create(body: NewSession) -> Created:
    zeros = [0.0] * len(body.params)
    id_ = uuid4().hex
    await store.set(f"session:{id_}", State(step=0, lr=body.lr, params=body.params, m=zeros, v=zeros).model_dump_json())
    return Created(id=id_)


@app.get("/sessions/{id_}")
async def read(id_: str) -> State:
    return await load(id_)


@app.post("/sessions/{id_}/steps")
async def step(id_: str, body: Step) -> Stepped:
    state = await load(id_)
    g = np.array(body.gradients["w"], np.float32)
    if g.shape != (len(state.params),) or not np.isfinite(g).all():
        raise HTTPException(422, "the gradient does not fit")
    state.step += 1
    m = np.float32(0.9) * np.array(state.m, np.float32) + np.float32(0.1) * g
    v = np.float32(0.999) * np.array(state.v, np.float32) + np.float32(0.001) * g * g
    corrected = m / (1 - 0.9**state.step), v / (1 - 0.999**state.step)
    params = np.array(state.params, np.float32) - state.lr * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    state.params, state.m, state.v = params.tolist(), m.tolist(), v.tolist()
    await store.set(f"session:{id_}", state.model_dump_json())
    return Stepped(step=state.step, params={"w": state.params})


async def load(id_: str) -> State:
    found = await store.get(f"session:{id_}")
    if found is None:
        raise HTTPException(404, "no such session")
    return State.model_validate_json(found)


if __name__ == "__main__":
    run(app)

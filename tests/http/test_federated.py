"""The recipes of docs/federated.md, taken out of the page, against the arithmetic of their papers.

Each opens its session with the JSON that stands there and sends contributions with the members that stand there; the
tensors alone, and the session's dtype, are the tests'. What is expected is worked out here in float64, from the papers.
Tests that are named after a fault are for one that some other library has.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import httpx
import numpy as np
import pytest
import safetensors.numpy

from core.aggregation.aggregation import Aggregation
from core.recipe import describe
from tests.running import ROOT, Server
from tests.test_docs import addresses, blocks_of, compare, needs_shell, printed
from tests.wire import create

Array: TypeAlias = np.ndarray
Json: TypeAlias = dict[str, Any]
PAGE = ROOT / "docs" / "federated.md"
START = np.array([0.5, -1.0, 2.0, 0.25, -0.75, 1.5, -0.125])
PAYLOADS = {"gradients", "deltas", "params"}
ROUNDS = 4


# -- the page --------------------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """What stands under a heading: what opens the session, and what a worker sends."""

    opens: Json
    sends: Json


def recipes() -> dict[str, Recipe]:
    """Those of the page, by their headings."""
    found = {}
    for section in PAGE.read_text().partition("\n## Recipes\n")[2].split("\n### ")[1:]:
        blocks = re.findall(r"^```json\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        assert len(blocks) == 2, section
        found[section.partition("\n")[0]] = Recipe(*map(json.loads, blocks))
    return found


RECIPES = recipes()


def test_every_recipe_of_the_page_is_tested() -> None:
    named = set(re.findall(r'opened\(client, "(.+?)"', Path(__file__).read_text())) | set(SERVERS)
    assert named == set(RECIPES)


@needs_shell
@pytest.mark.parametrize("language", ["sh", "python"])
def test_what_the_page_runs_prints_what_it_says(server: Server, tmp_path: Path, language: str) -> None:
    blocks = [block for block in blocks_of(PAGE.read_text()) if block.language == language]
    assert blocks
    assert blocks[-1].expected
    compare(blocks, printed(blocks, language, tmp_path, addresses(server)), PAGE)


def test_the_table_of_members_is_that_of_the_core() -> None:
    """Their names, their order, and what is there if they are left out."""
    section = PAGE.read_text().partition("\n## All members\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    left_out = {name: default for name, _, default, *_ in ([cell.strip("`") for cell in row] for row in rows)}
    shown = {field.name: describe(field.default) for field in fields(Aggregation)}
    shown |= {"reduce": "mean"}
    assert left_out == {
        name: "—" if value is None else value if isinstance(value, str) else json.dumps(value)
        for name, value in shown.items()
    }


# -- a session and its workers ---------------------------------------------------------------------------------------


def named(vector: Array) -> Json:
    """(7,) as the tensors of a session."""
    return {"w": vector[:6].reshape(3, 2).tolist(), "b": float(vector[6])}


def flat(tensors: Mapping[str, Any]) -> Array:
    return np.concatenate([np.asarray(tensors[name], np.float64).reshape(-1) for name in ("w", "b")])


class Session:
    """A session that was opened by a recipe, seen by its workers."""

    def __init__(self, client: httpx.Client, recipe: Recipe) -> None:
        assert set(recipe.opens) == {"optimizer", "aggregation", "params"}
        self.client, self.opens, self.sends = client, recipe.opens, recipe.sends
        made = create(client, **recipe.opens | {"params": named(START), "dtype": "float64"})
        self.path = f"/v1/sessions/{made['id']}"

    def post(self, tensors: Array, headers: Mapping[str, str] | None = None, **members: Any) -> httpx.Response:
        """A contribution as the page has it, with other values."""
        (payload,) = PAYLOADS & set(self.sends)
        assert set(members) == set(self.sends) - {payload}, "what is beside it on the page"
        return self.client.post(f"{self.path}/steps", json=members | {payload: named(tensors)}, headers=headers)

    def step(self, tensors: Array, **members: Any) -> Array:
        """A contribution that makes a step; the parameters after it."""
        reply = self.post(tensors, **members)
        assert reply.status_code == 200, reply.text
        return flat(reply.json()["params"])

    def pull(self, **query: str) -> Array:
        return flat(self.client.get(f"{self.path}/params", params=query).raise_for_status().json()["params"])

    def described(self) -> Json:
        found: Json = self.client.get(self.path).json()
        return found

    def slots(self) -> dict[str, Array]:
        """By name, flat."""
        state = safetensors.numpy.load(self.client.get(f"{self.path}/state").content)
        names = {name.partition(":")[2] for name in state if ":" in name and not name.startswith(":")}
        return {slot: flat({"w": state[f"w:{slot}"], "b": state[f"b:{slot}"]}) for slot in names}

    def round(self, contributions: Sequence[Json]) -> Array:
        """One whole round, a member of `contributions` for each call of `post`; the parameters after it."""
        step, needed = self.described()["step"], len(contributions)
        for received, members in enumerate(contributions[:-1], 1):
            reply = self.post(**members)
            assert reply.status_code == 202, reply.text
            assert reply.json() == {"round": step + 1, "received": received, "needed": needed}
        reply = self.post(**contributions[-1])
        assert reply.status_code == 200, reply.text
        assert reply.json()["step"] == step + 1
        return flat(reply.json()["params"])


def opened(client: httpx.Client, name: str) -> Session:
    return Session(client, RECIPES[name])


def near(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


def far(found: Array, other: Array) -> None:
    """The other library's numbers are not within a thousandth."""
    assert np.abs(found - other).max() > 1e-3 * np.abs(found).max()


def deltas(seed: int, count: int) -> list[Array]:
    return list(np.random.default_rng(seed).normal(0, 0.1, (count, START.size)))


# -- rounds: what the server makes of the mean -----------------------------------------------------------------------

Slots: TypeAlias = dict[str, Array | float]
# Parameters, the mean delta, the slots (empty at first), the optimizer's members -> parameters.
Paper: TypeAlias = Callable[[Array, Array, Slots, Json], Array]


def fedavg(x: Array, delta: Array, s: Slots, of: Json) -> Array:
    return x + delta


def fedavgm(x: Array, delta: Array, s: Slots, of: Json) -> Array:
    """Hsu, Qi & Brown 2019, section 4.3."""
    s["v"] = of["momentum"] * s.get("v", 0.0) - delta
    return x - s["v"]


def diloco(x: Array, delta: Array, s: Slots, of: Json) -> Array:
    """Douillard et al. 2023, Algorithm 1, with Nesterov's momentum as torch has it: 0.7 and 0.9 are the paper's."""
    s["b"] = 0.9 * s.get("b", 0.0) - delta
    return x - 0.7 * (-delta + 0.9 * s["b"])


def adaptive(grown: Callable[[Array | float, Array, float], Array], beta1: float) -> Paper:
    """Reddi et al. 2020, Algorithm 2; `grown` is its line for v."""

    def paper(x: Array, delta: Array, s: Slots, of: Json) -> Array:
        first, tau = of.get("beta1", beta1), of["tau"]
        s["m"] = first * s.get("m", 0.0) + (1 - first) * delta
        s["v"] = grown(s.get("v", tau**2), delta**2, of.get("beta2", math.nan))
        return x + of["lr"] * s["m"] / (np.sqrt(s["v"]) + tau)

    return paper


SERVERS: dict[str, Paper] = {
    "FedAvg": fedavg,
    "FedAvgM": fedavgm,
    "FedAdagrad": adaptive(lambda v, square, _: v + square, 0.0),
    "FedAdam": adaptive(lambda v, square, beta2: beta2 * v + (1 - beta2) * square, 0.9),
    "FedYogi": adaptive(lambda v, square, beta2: v - (1 - beta2) * square * np.sign(v - square), 0.9),
    "DiLoCo": diloco,
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_round_is_the_step_of_its_paper(client: httpx.Client, name: str) -> None:
    session = Session(client, RECIPES[name])
    x, slots, weights = START, {}, [1.0, 1.0, 1.0]
    if "weight" in session.sends:
        weights = [600.0, 50.0, 350.0]
    assert session.opens["aggregation"]["workers"] == len(weights)
    for number in range(ROUNDS):
        near(session.pull(), x)
        sent = deltas(number, len(weights))
        found = session.round(
            [
                {"tensors": delta, "worker": f"w{i}"} | ({"weight": weight} if "weight" in session.sends else {})
                for i, (delta, weight) in enumerate(zip(sent, weights, strict=True))
            ]
        )
        mean = sum(weight * delta for weight, delta in zip(weights, sent, strict=True)) / sum(weights)
        x = SERVERS[name](x, mean, slots, session.opens["optimizer"])
        near(found, x)


def test_models_in_the_place_of_deltas_are_the_same_round(client: httpx.Client) -> None:
    """As the page says under FedAvg."""
    recipe = RECIPES["FedAvg"]
    session = Session(
        client, recipe._replace(sends={"params": {}} | {m: recipe.sends[m] for m in ("worker", "weight")})
    )
    models, weights = [START + delta for delta in deltas(1, 3)], [1.0, 2.0, 5.0]
    contributions = [
        {"tensors": model, "worker": f"w{i}", "weight": weight}
        for i, (model, weight) in enumerate(zip(models, weights, strict=True))
    ]
    near(session.round(contributions), (models[0] + 2 * models[1] + 5 * models[2]) / 8)


def test_the_model_of_a_straggler_pulls_the_others_back_and_its_delta_does_not(client: httpx.Client) -> None:
    """As the page says in the same place."""
    recipe, delta = RECIPES["FedAvg"], np.full(START.size, 0.5)
    for payload, sent, expected in (("deltas", delta, START + 2 * delta), ("params", START + delta, START + delta)):
        session = Session(client, recipe._replace(sends={payload: {}, "worker": "", "weight": 1}))
        for _ in range(2):  # to the second round it contributes what it made of the start
            found = session.round([{"tensors": sent, "worker": f"w{i}", "weight": 1} for i in range(3)])
        near(found, expected)


def test_a_round_that_waits_for_the_dead_goes_on_in_a_session_with_a_timeout(client: httpx.Client) -> None:
    """As the page says of workers that die: from the checkpoint, with its recipe changed."""
    session, delta = opened(client, "FedAvgM"), np.full(START.size, 0.5)
    session.round([{"tensors": delta, "worker": f"w{i}", "weight": 1} for i in range(3)])
    assert session.post(delta, worker="w0", weight=1).status_code == 202
    state = client.get(f"{session.path}/state").content
    end = 8 + int.from_bytes(state[:8], "little")
    header = json.loads(state[8:end])
    of = json.loads(header["__metadata__"]["recipe"])
    of["aggregation"]["timeout"] = 0.1
    header["__metadata__"]["recipe"] = json.dumps(of)
    text = json.dumps(header).encode()
    made = client.post(
        "/v1/sessions",
        content=len(text).to_bytes(8, "little") + text + state[end:],
        headers={"Content-Type": "application/vnd.safetensors"},
    )
    assert made.status_code == 201, made.text
    path = f"/v1/sessions/{made.json()['id']}/params"
    reply = client.get(path, params={"after": 1, "wait": 30})
    assert reply.status_code == 200, reply.text
    beta = session.opens["optimizer"]["momentum"]
    near(flat(reply.json()["params"]), START + delta + (beta * delta + delta))


def test_fedadam_has_no_bias_correction_and_starts_v_at_tau_squared(client: httpx.Client) -> None:
    session, sent = opened(client, "FedAdam"), deltas(2, 3)
    of = session.opens["optimizer"]
    lr, beta1, beta2, tau = of["lr"], of["beta1"], of["beta2"], of["tau"]
    found = session.round([{"tensors": delta, "worker": f"w{i}"} for i, delta in enumerate(sent)])
    delta = (sent[0] + sent[1] + sent[2]) / 3
    m, v = (1 - beta1) * delta, beta2 * tau**2 + (1 - beta2) * delta**2
    near(found, START + lr * m / (np.sqrt(v) + tau))
    slots = session.slots()
    near(slots["v"], v)
    near(slots["m"], -m)
    zero = (1 - beta2) * delta**2  # Flower: v from 0, and the bias corrected by the powers t + 1
    far(found, START + lr * math.sqrt(1 - beta2**2) / (1 - beta1**2) * m / (np.sqrt(zero) + tau))
    assert (np.abs(slots["v"] - zero) > 0.9 * tau**2).all()


def test_fedyogi_does_not_decay_v(client: httpx.Client) -> None:
    """A large round, then one of almost nothing: v stays where it is. Adam's would shrink, and OpenFL's Yogi's."""
    session = opened(client, "FedYogi")
    beta2, tau = session.opens["optimizer"]["beta2"], session.opens["optimizer"]["tau"]
    large, small = np.full(START.size, 3.0), np.full(START.size, 1e-4)
    for delta in (large, small):
        session.round([{"tensors": delta, "worker": f"w{i}"} for i in range(3)])
    before = tau**2 + (1 - beta2) * large**2
    found = session.slots()["v"]
    near(found, before - (1 - beta2) * small**2)
    far(found, beta2 * before)


# -- buffers and age -------------------------------------------------------------------------------------------------


def test_fedbuff_is_that_of_its_paper(client: httpx.Client) -> None:
    """Nine workers of which some are slow: whoever finishes starts again from what is there then."""
    session = opened(client, "FedBuff")
    lr, size = session.opens["optimizer"]["lr"], session.opens["aggregation"]["size"]
    x, step, bases, buffered, ages = START, 0, [0] * 9, [], []
    order = [0, 1, 2, 0, 3, 1, 0, 4, 0, 1, 5, 5]
    for worker, delta in zip(order, deltas(3, len(order)), strict=True):
        reply = session.post(delta, worker=f"w{worker}", base_step=bases[worker])
        ages.append(step - bases[worker])
        buffered.append(delta / math.sqrt(1 + ages[-1]))
        if len(buffered) == size:
            assert reply.status_code == 200, reply.text
            x, step, buffered = x + lr * sum(buffered) / size, step + 1, []
            near(flat(reply.json()["params"]), x)
        else:
            assert reply.status_code == 202, reply.text
            assert reply.json() == {"round": step + 1, "received": len(buffered), "needed": size}
        bases[worker] = step
    assert step == ROUNDS
    assert set(ages) >= {0, 1, 2, 3}
    near(session.pull(), x)


def test_fedbuff_weighs_by_one_over_root_of_one_plus_staleness(client: httpx.Client) -> None:
    session = opened(client, "FedBuff")
    lr, size, delta = session.opens["optimizer"]["lr"], session.opens["aggregation"]["size"], np.full(START.size, 0.5)
    for _ in range(3):
        session.round([{"tensors": 0 * delta, "worker": "w1", "base_step": 0} for _ in range(size)])
    found = session.round([{"tensors": delta, "worker": "w1", "base_step": 0} for _ in range(size)])
    near(found, START + lr * delta / 2)
    far(found, START + lr * delta / (1 + math.sqrt(3)))  # NVFlare's


def test_fedasync_is_that_of_its_paper(client: httpx.Client) -> None:
    session = opened(client, "FedAsync")
    alpha, a = session.opens["optimizer"]["lr"], session.opens["aggregation"]["staleness"]["a"]
    x, bases, pulled = START, [0, 0, 0], [START, START, START]
    order = [0, 1, 1, 2, 0, 0, 2, 1]
    for step, (worker, delta) in enumerate(zip(order, deltas(4, len(order)), strict=True)):
        model = pulled[worker] + delta
        rate = alpha * (step - bases[worker] + 1) ** -a
        x = (1 - rate) * x + rate * model
        near(session.step(model, worker=f"w{worker}", base_step=bases[worker]), x)
        bases[worker], pulled[worker] = step + 1, session.pull()


def test_fedasync_mixes_models_and_does_not_add_them(client: httpx.Client) -> None:
    """FedML adds whole models: a worker that sends back what it got would double the parameters."""
    session = opened(client, "FedAsync")
    for step in range(3):
        near(session.step(START, worker="w1", base_step=step), START)


def test_what_is_too_old_is_refused(client: httpx.Client) -> None:
    """By `max_staleness`, as the page's FedAsync has it."""
    session = opened(client, "FedAsync")
    most = session.opens["aggregation"]["max_staleness"]
    for step in range(most + 1):
        session.step(START, worker="w1", base_step=step)
    reply = session.post(START, worker="w2", base_step=0)
    assert reply.status_code == 409, reply.text
    problem = reply.json()
    assert problem["type"] == "/problems/stale-gradient"
    assert (problem["step"], problem["staleness"], problem["max_staleness"]) == (most + 1, most + 1, most)
    assert session.described()["step"] == most + 1
    session.step(START, worker="w2", base_step=1)


def test_the_rate_falls_with_the_age(client: httpx.Client) -> None:
    """Zhang et al. 2015, Equation 3: the rate is divided by the age, and by 1 where it is 0."""
    session = opened(client, "Staleness-aware asynchronous SGD")
    x, lr = START, session.opens["optimizer"]["lr"]
    for step, (base, g) in enumerate(zip([0, 0, 0, 3, 1, 0], deltas(5, 6), strict=True)):
        x = x - lr / max(1, step - base) * g
        near(session.step(g, worker="w1", base_step=base), x)


# -- clocks ----------------------------------------------------------------------------------------------------------


def test_nobody_runs_more_than_the_bound_ahead(client: httpx.Client) -> None:
    """Ho et al. 2013: who is at clock c goes on if c - min <= s; what it sends is applied at once."""
    session = opened(client, "Stale synchronous parallel")
    x, lr, bound = START, session.opens["optimizer"]["lr"], session.opens["aggregation"]["bound"]
    clocks = {"w1": 0, "w2": 0}
    order = ["w1", "w1", "w1", "w2", "w1", "w1", "w2", "w2", "w2", "w2", "w2"]
    for worker, g in zip(order, deltas(6, len(order)), strict=True):
        if clocks[worker] - min(clocks.values()) <= bound:
            x = x - lr * g
            near(session.step(g, worker=worker), x)
            clocks[worker] += 1
            continue
        reply = session.post(g, worker=worker)
        assert reply.status_code == 409, reply.text
        problem = reply.json()
        assert problem["type"] == "/problems/too-far-ahead"
        assert (problem["clock"], problem["slowest"]) == (clocks[worker], min(clocks.values()))
        assert problem["bound"] == bound
        assert int(reply.headers["retry-after"]) >= 1
    assert clocks == {"w1": 3, "w2": 5}, "three were refused"
    near(session.pull(), x)


# -- delays ----------------------------------------------------------------------------------------------------------


def test_dc_asgd_keeps_a_backup_per_worker(client: httpx.Client) -> None:
    """Zheng et al. 2016, Algorithm 2: x_bak(m) is set when worker m pulls. MXNet keeps one backup for all of them."""
    session = opened(client, "DC-ASGD")
    lr, strength = session.opens["optimizer"]["lr"], session.opens["aggregation"]["delay_compensation"]["lambda"]
    x, single, previous = START, START, START
    backups = {worker: session.pull(worker=worker) for worker in ("w1", "w2", "w3")}
    order = ["w1", "w1", "w2", "w1", "w3", "w3", "w2", "w1"]
    for worker, delta in zip(order, deltas(7, len(order)), strict=True):
        g = 30 * delta  # so that the compensation is no small matter
        x = x - lr * (g + strength * g * g * (x - backups[worker]))
        single, previous = single - lr * (g + strength * g * g * (single - previous)), single
        reply = session.post(g, worker=worker, headers={"Prefer": "return=minimal"})
        assert reply.status_code == 200, reply.text
        near(session.pull(), x)  # nobody's
        backups[worker] = session.pull(worker=worker)
        near(backups[worker], x)
    far(x, single)


def test_the_parameters_in_a_reply_are_pulled(client: httpx.Client) -> None:
    session = opened(client, "DC-ASGD")
    lr, strength = session.opens["optimizer"]["lr"], session.opens["aggregation"]["delay_compensation"]["lambda"]
    x, backups = START, {}
    for worker, delta in zip(["w1", "w2", "w1", "w2", "w2", "w1"], deltas(8, 6), strict=True):
        g = 30 * delta
        x = x - lr * (g + strength * g * g * (x - backups.get(worker, x)))  # not pulled yet: no compensation
        backups[worker] = session.step(g, worker=worker)
        near(backups[worker], x)


# -- privacy ---------------------------------------------------------------------------------------------------------


def noise(seed: int, step: int) -> Array:
    """Standard normals of a round, for both tensors."""
    drawn = []
    for name, size in (("w", 6), ("b", 1)):
        key = hashlib.blake2b(f"round:{seed}:{step}:{name}".encode(), digest_size=16).digest()
        stream = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        drawn.append(stream.standard_normal(size))
    return np.concatenate(drawn)


def spent(z: float, steps: int, delta: float) -> float:
    """Of the Gaussian mechanism: Mironov 2017 for the divergence, Canonne, Kamath & Steinke 2020 for what it means."""
    orders = [1 + i / 10 for i in range(1, 100)] + list(range(11, 64)) + [128, 256, 512, 1024]
    return min(
        steps * a / (2 * z * z) + math.log(1 - 1 / a) - (math.log(delta) + math.log(a)) / (a - 1) for a in orders
    )


def test_dp_fedavg_clips_adds_noise_and_counts_epsilon(client: httpx.Client) -> None:
    session = opened(client, "DP-FedAvg")
    of = session.opens["aggregation"]
    clip, z, workers = of["clip_norm"], of["noise_multiplier"], of["workers"]
    assert "seed" not in of, "whoever pastes it would have noise that everybody knows"
    seed = session.described()["aggregation"]["seed"]
    assert seed != opened(client, "DP-FedAvg").described()["aggregation"]["seed"]
    assert session.described()["privacy"] == {
        "epsilon": 0.0, "delta": of["delta"], "noise_multiplier": z, "sampling_rate": 1.0, "steps": 0
    }  # fmt: skip
    x = START
    for step in range(1, ROUNDS + 1):
        sent = [delta * scale for delta, scale in zip(deltas(20 + step, workers), (1, 10, 100), strict=True)]
        found = session.round([{"tensors": delta, "worker": f"w{i}"} for i, delta in enumerate(sent)])
        clipped = [delta * min(1.0, clip / math.sqrt(math.fsum(delta**2))) for delta in sent]
        assert sum(map(np.linalg.norm, clipped)) < 0.9 * clip * workers, "one of them is not clipped"
        x = x + sum(clipped) / workers - z * clip / workers * noise(seed, step)
        near(found, x)
        privacy = session.described()["privacy"]
        assert privacy["steps"] == step
        assert privacy["epsilon"] == pytest.approx(spent(z, step, of["delta"]), rel=1e-9)
    history = client.get(f"{session.path}/history").json()["data"]
    assert [record["epsilon"] for record in history] == pytest.approx(
        [spent(z, step, of["delta"]) for step in range(1, ROUNDS + 1)], rel=1e-9
    )


def test_what_the_noise_is_not_enough_for_is_refused(client: httpx.Client) -> None:
    session = opened(client, "DP-FedAvg")
    for more in ({"weight": 2}, {"partial": True, "deltas": {"w": named(START)["w"]}}):
        body = {"worker": "w1", "deltas": named(START)} | more
        reply = client.post(f"{session.path}/steps", json=body)
        assert reply.status_code == 422, reply.text
        assert reply.json()["type"] == "/problems/not-reducible"
    assert client.post(f"{session.path}/steps", json={"worker": "w1", "deltas": named(START)}).json()["received"] == 1


# -- workers that send anything --------------------------------------------------------------------------------------


def krum(sent: Sequence[Array], byzantine: int) -> int:
    """Blanchard et al. 2017, section 4."""
    scores = []
    for i, own in enumerate(sent):
        apart = sorted(math.fsum((own - other) ** 2) for j, other in enumerate(sent) if j != i)
        scores.append(math.fsum(apart[: len(sent) - byzantine - 2]))
    return scores.index(min(scores))


@pytest.mark.parametrize("attack", [1e6, -30.0, 0.3])
def test_krum_takes_the_one_that_is_nearest_to_the_others(client: httpx.Client, attack: float) -> None:
    session = opened(client, "Robust to arbitrary workers")
    of, workers = session.opens["optimizer"], session.opens["aggregation"]["workers"]
    byzantine = session.opens["aggregation"]["reduce"]["byzantine"]
    x, slots = START, {}
    for number in range(3):
        sent = [1.0 + delta for delta in deltas(30 + number, workers)]
        bad = number % workers
        sent[bad] = attack * sent[bad]
        best = krum(sent, byzantine)
        assert best != bad
        x = SERVERS["FedAdam"](x, sent[best], slots, {"tau": 1e-3, "beta1": 0.9, "beta2": 0.99} | of)
        near(session.round([{"tensors": delta, "worker": f"w{i}"} for i, delta in enumerate(sent)]), x)


# -- again -----------------------------------------------------------------------------------------------------------


def test_a_contribution_that_is_sent_again_counts_once(client: httpx.Client) -> None:
    session, sent = opened(client, "FedAvg"), deltas(40, 3)
    members = [{"worker": f"w{i}", "weight": 1.0} for i in range(3)]
    for i in (0, 0, 1, 0, 1):
        reply = session.post(sent[i], headers={"Idempotency-Key": f"round 1, w{i}"}, **members[i])
        assert reply.status_code == 202, reply.text
    assert reply.json() == {"round": 1, "received": 2, "needed": 3}
    assert session.post(sent[0], **members[0]).json()["type"] == "/problems/already-contributed"
    expected = START + (sent[0] + sent[1] + sent[2]) / 3
    near(session.step(sent[2], **members[2]), expected)
    again = session.post(sent[1], headers={"Idempotency-Key": "round 1, w1"}, **members[1])
    assert (again.status_code, again.headers.get("ravine-replayed")) == (200, "true"), again.text
    near(session.pull(), expected)
    assert session.described()["step"] == 1

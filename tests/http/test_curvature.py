"""What second-order methods are sent beside the gradient: the Hessian, and its diagonal when that is due."""

from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy

from tests.http.contributions import post
from tests.http.refusals import pointers, refused, unchanged
from tests.wire import create, tensors

Array = np.ndarray
SHAPES = {"w": [2, 2], "b": []}
START = {"w": np.array([[1.0, -1.0], [2.0, 0.5]]), "b": np.array(-0.5)}
G = {"w": np.array([[0.5, -1.0], [2.0, 0.25]]), "b": np.array(1.0)}
H = {"w:hessian_diagonal": np.array([[1.0, 2.0], [0.5, 4.0]]), "b:hessian_diagonal": np.array(3.0)}
SOPHIA = {"kind": "sophia", "lr": 0.1, "weight_decay": 0.0, "interval": 3, "gamma": 1.0, "beta2": 0.75}


def begun(client: httpx.Client, optimizer: Any = SOPHIA, *, held: bool = True, **members: Any) -> str:
    values = {"params": {name: array.tolist() for name, array in START.items()}} if held else {"shapes": SHAPES}
    return str(create(client, **{"optimizer": optimizer, "dtype": "float64"} | values | members)["id"])


def state(client: httpx.Client, session: str) -> dict[str, Array]:
    loaded: dict[str, Array] = safetensors.numpy.load(client.get(f"/v1/sessions/{session}/state").content)
    return loaded


def sophia(steps: list[bool]) -> list[dict[str, Array]]:
    """By hand: the parameters after each step; those that are True bring the diagonal."""
    points, found = dict(START), []
    m = {name: np.zeros_like(array) for name, array in START.items()}
    h = {name: np.zeros_like(array) for name, array in START.items()}
    for seen in steps:
        for name, g in G.items():
            if seen:
                h[name] = 0.75 * h[name] + 0.25 * H[f"{name}:hessian_diagonal"]
            m[name] = 0.96 * m[name] + 0.04 * g
            points[name] = points[name] - 0.1 * np.clip(m[name] / np.maximum(h[name], 1e-12), -1.0, 1.0)
        found.append(dict(points))
    return found


@pytest.mark.parametrize("form", ["json", "safetensors"])
def test_the_diagonal_is_taken_when_it_comes(client: httpx.Client, form: str) -> None:
    """Due at 1, 4, 7, …; one that comes between counts as well."""
    session = begun(client)
    given = [True, False, True, True, False]
    for seen, expected in zip(given, sophia(given), strict=True):
        got = tensors(post(client, session, G | (H if seen else {}), {}, form=form))
        for name, values in expected.items():
            np.testing.assert_allclose(got[name], values, rtol=1e-13)


@pytest.mark.parametrize("form", ["json", "safetensors"])
def test_it_is_required_when_it_is_due(client: httpx.Client, form: str) -> None:
    session = begun(client)
    for t in range(1, 8):
        if t % 3 == 1:
            with unchanged(client, session):
                document = refused(post(client, session, G, {}, form=form), 422, "hessian-required")
                assert "`hessian_diagonal`" in document["detail"]
            reply = post(client, session, G | H, {}, form=form)
        else:
            reply = post(client, session, G, {}, form=form)
        assert (reply.status_code, reply.headers["ravine-step"]) == (200, str(t)), reply.text


def test_it_is_due_by_the_moves_and_not_by_the_gradients(client: httpx.Client) -> None:
    session = begun(client, SOPHIA | {"interval": 2}, transforms=[{"kind": "accumulate", "steps": 2}])
    needed = []
    for _ in range(8):
        bare = post(client, session, G, {})
        needed.append(bare.status_code == 422)
        if needed[-1]:
            refused(bare, 422, "hessian-required")
            assert post(client, session, G | H, {}).status_code == 200
    assert needed == [True, True, False, False, True, True, False, False]


@pytest.mark.parametrize("form", ["json", "safetensors"])
def test_faults_of_it_name_the_tensor(client: httpx.Client, form: str) -> None:
    session = begun(client)
    one, other = "w:hessian_diagonal", "b:hessian_diagonal"
    with unchanged(client, session):
        short = refused(post(client, session, G | {one: H[one]}, {}, form=form), 422, "missing-gradient")
        assert short["tensor"] == "b"
        assert "hessian_diagonal" in short["detail"]
        wrong = refused(post(client, session, G | H | {one: np.ones(4)}, {}, form=form), 422, "shape-mismatch")
        assert (wrong["tensor"], wrong["expected"], wrong["received"]) == ("w", [2, 2], [4])
        unknown = {"x:hessian_diagonal": np.ones(2)}
        assert refused(post(client, session, G | H | unknown, {}, form=form), 422, "unknown-tensor")["tensor"] == "x"
    if form == "safetensors":
        with unchanged(client, session):
            endless = H | {other: np.array(np.inf)}
            assert refused(post(client, session, G | endless, {}), 422, "non-finite")["tensor"] == "b"


@pytest.mark.parametrize(
    ("given", "place"), [(None, ""), ([1.0], ""), (1.0, ""), ({"w": "1"}, "/w"), ({"w": None}, "/w")]
)
def test_what_is_no_diagonal(client: httpx.Client, given: Any, place: str) -> None:
    session = begun(client)
    body = {"gradients": {name: array.tolist() for name, array in G.items()}, "hessian_diagonal": given}
    with unchanged(client, session):
        document = refused(client.post(f"/v1/sessions/{session}/steps", json=body), 422, "invalid-request")
        assert pointers(document) == {f"/hessian_diagonal{place}"}


def test_frozen_tensors_bring_one_too(client: httpx.Client) -> None:
    session = begun(client, groups=[{"match": "b", "frozen": True}])
    assert post(client, session, G | H, {}).status_code == 200
    found = state(client, session)
    np.testing.assert_allclose(found["w:h"], 0.25 * H["w:hessian_diagonal"], rtol=1e-15)
    assert found["b:h"] == 0.0


def test_of_a_part_of_the_tensors_that_part(client: httpx.Client) -> None:
    session = begun(client)
    sent = {"w": G["w"], "w:hessian_diagonal": H["w:hessian_diagonal"]}
    assert post(client, session, sent, {"partial": True}).status_code == 200
    assert state(client, session)["b:h"] == 0.0
    assert np.all(state(client, session)["w:h"] > 0.0)


def test_a_client_may_hold_the_parameters(client: httpx.Client) -> None:
    optimizer = SOPHIA | {"weight_decay": 0.5}
    session = begun(client, optimizer, held=False)
    with unchanged(client, session):
        refused(post(client, session, G | H, {}), 422, "params-required")
    got = tensors(post(client, session, G | H | {f"{name}:params": array for name, array in START.items()}, {}))
    (without,) = sophia([True])
    for name, start in START.items():
        np.testing.assert_allclose(got[name], without[name] - start - 0.1 * 0.5 * start, rtol=1e-12)


def test_methods_that_do_not_want_it_leave_it_alone(client: httpx.Client) -> None:
    first, second = begun(client, "adam"), begun(client, "adam")
    assert tensors(post(client, first, G | H, {})).keys() == SHAPES.keys()
    assert tensors(post(client, second, G, {})).keys() == SHAPES.keys()
    assert state(client, first).keys() == state(client, second).keys()
    for name, array in state(client, first).items():
        assert array.tobytes() == state(client, second)[name].tobytes()


def test_the_whole_hessian_is_no_diagonal(client: httpx.Client) -> None:
    session, newton = begun(client), begun(client, "newton")
    with unchanged(client, session), unchanged(client, newton):
        refused(post(client, session, G | {":hessian": np.eye(5)}, {}), 422, "hessian-required")
        refused(post(client, newton, G | H, {}), 422, "hessian-required")
        wrong = refused(post(client, newton, G | {":hessian": np.eye(4)}, {}), 422, "shape-mismatch")
        assert (wrong["expected"], wrong["received"]) == ([5, 5], [4, 4])

"""What a request says is contributed, and by whom: the same from either format, and from the log again."""

from typing import Any

import numpy as np
import pytest

from core.aggregation.ledger import Sender
from core.compression import Places, Quantized
from core.contributions import Contribution, Gradient, Payload
from core.evaluate import Evaluator
from core.layout import Layout, Rows, Sent, Slot
from core.optimizers.adam import Adam
from core.recipe import Recipe
from core.session import Session
from service.contributions import PAYLOADS, members_of_query, of_json, of_safetensors
from service.errors import InvalidRequest
from service.tensors import of_tensors, tensors_of
from service.wire import safetensors
from service.wire.errors import InvalidValue, MalformedSafetensors
from service.wire.json import dumps
from tests.http.files import saved

W = [[1.0, 2.0], [3.0, -4.0]]
MEMBERS: dict[str, Any] = {"worker": "w-1", "base_step": 41, "weight": 32.5, "loss": 0.5, "partial": True}
TEXT = {"worker": "w-1", "base_step": "41", "weight": "32.5", "loss": "0.5", "partial": "true"}


def json_of(**members: Any) -> Contribution:
    return of_json(dumps(members))[0]


def file_of(tensors: dict[str, Any], **query: str) -> Contribution:
    return of_safetensors(saved(tensors), members_of_query(query))


def plain(sent: Sent) -> Any:
    """Nested tuples, with the form's name and the dtypes."""
    if isinstance(sent, Quantized):
        return "int8", str(sent.integers.dtype), sent.integers.tolist(), sent.scale
    if isinstance(sent, Rows | Places):
        return type(sent).__name__, sent[0].tolist(), plain(sent.values)
    return sent.tolist()


# -- the payload ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_payload_by_its_member_and_by_the_query(payload: Payload) -> None:
    told, filed = json_of(**{payload: {"w": W}}), file_of({"w": np.array(W)}, payload=payload)
    for contribution in (told, filed):
        assert contribution.payload == payload
        assert plain(contribution.gradients["w"]) == W
        assert contribution.params is None


def test_a_file_holds_gradients_unless_it_is_said_to_hold_something_else() -> None:
    assert file_of({"w": np.array(W)}).payload == "gradients"


@pytest.mark.parametrize("payload", ["gradients", "deltas"])
def test_params_beside_the_payload_are_the_values_that_a_client_holds(payload: Payload) -> None:
    told = json_of(**{payload: {"w": W}, "params": {"w": [[5.0]]}})
    filed = file_of({"w": np.array(W), "w:params": np.array([[5.0]])}, payload=payload)
    for contribution in (told, filed):
        assert contribution.payload == payload
        assert plain(contribution.gradients["w"]) == W
        assert contribution.params is not None
        assert plain(contribution.params["w"]) == [[5.0]]


@pytest.mark.parametrize(
    ("members", "pointer"),
    [
        ({}, "/gradients"),
        ({"loss": 1.0}, "/gradients"),
        ({"gradients": {}, "deltas": {}}, "/deltas"),
        ({"gradients": {}, "deltas": {}, "params": {}}, "/deltas"),
        ({"deltas": None}, "/deltas"),
        ({"deltas": [1]}, "/deltas"),
        ({"deltas": {"w": "1"}}, "/deltas/w"),
        ({"params": None}, "/params"),
        ({"params": [1]}, "/params"),
        ({"params": {"w": {"indices": [0], "values": [[1]]}}}, "/params/w"),
        ({"params": {"w": {"positions": [0], "values": [1]}}}, "/params/w"),
        ({"params": {"w": {"values": [1], "scale": 1}}}, "/params/w"),
        ({"deltas": {}, "params": {"w": {"values": [1], "scale": 1}}}, "/params/w"),
        ({"gradients": {}, "payload": "gradients"}, "/payload"),
        ({"delta": {}}, "/delta"),
    ],
)
def test_what_is_no_payload(members: dict[str, Any], pointer: str) -> None:
    with pytest.raises((InvalidRequest, InvalidValue)) as caught:
        json_of(**members)
    error = caught.value
    found = [error.pointer] if isinstance(error, InvalidValue) else [fault.pointer for fault in error.faults]
    assert found == [pointer]


@pytest.mark.parametrize("text", ["", "gradient", "Deltas", "params,deltas"])
def test_what_is_no_payload_in_the_query(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        members_of_query({"payload": text})
    assert [fault.pointer for fault in caught.value.faults] == ["/query/payload"]


def test_parameters_in_a_file_are_whole() -> None:
    assert plain(file_of({"w": np.float16(W)}, payload="params").gradients["w"]) == W
    for parts in (
        {"w": np.zeros((2, 2), np.int8), "w:scale": np.float32(1)},
        {"w": np.zeros((2, 2), np.int8)},
        {"w:indices": np.array([0]), "w:values": np.zeros((1, 2))},
        {"w:positions": np.array([0]), "w:values": np.zeros(1)},
    ):
        with pytest.raises(MalformedSafetensors):
            file_of(parts, payload="params")


# -- who sent it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", PAYLOADS)
def test_members_beside_the_payload(payload: Payload) -> None:
    told = json_of(**{payload: {"w": W}}, **MEMBERS)
    filed = file_of({"w": np.array(W)}, payload=payload, **TEXT)
    for contribution in (told, filed):
        for name, value in MEMBERS.items():
            found = getattr(contribution, name)
            assert (found, type(found)) == (value, type(value)), name
        assert contribution.at == 0.0


def test_members_that_are_left_out() -> None:
    for contribution in (json_of(gradients={}), file_of({})):
        assert contribution == Contribution({})


# -- from the log again --------------------------------------------------------------------------------------------

FORMS: dict[str, tuple[Any, Any]] = {
    "whole": (W, W),
    "int8": ({"values": [[1, -128], [127, 0]], "scale": 0.1}, ("int8", "int8", [[1, -128], [127, 0]], 0.1)),
    "rows": ({"indices": [1, 1], "values": [[1, 2], [3, 4]]}, ("Rows", [1, 1], [[1, 2], [3, 4]])),
    "int8 rows": (
        {"indices": [1], "values": [[1, 2]], "scale": -0.5},
        ("Rows", [1], ("int8", "int8", [[1, 2]], -0.5)),
    ),
    "places": ({"positions": [3, 0], "values": [1, 2]}, ("Places", [3, 0], [1, 2])),
    "int8 places": (
        {"positions": [3], "values": [-7], "scale": 1e-300},
        ("Places", [3], ("int8", "int8", [-7], 1e-300)),
    ),
}


def checked(dtype: str) -> Gradient:
    """Of somebody's it tells the dtype alone: what came is logged, not what the session made of it."""
    slot = Slot("w", (2, 2), 0, 4)
    return Gradient([(slot, np.full(4, 9, dtype))], [], None, None, {}, None, 0.0, Sender("a"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_gradient_is_logged_as_it_was_cast_when_it_was_checked(dtype: str) -> None:
    numbers = {"w": [[0.1, -2.5], [1e-30, 3.0]], "b": [1 / 3]}
    recipe = Recipe(Adam(), Layout({"b": [1], "w": [2, 2]}), dtype=dtype)  # type: ignore[arg-type]
    contribution = json_of(gradients=numbers)
    logged = tensors_of(contribution, Session.new(recipe, None, Evaluator()).check(contribution))  # type: ignore[arg-type]
    assert list(logged) == ["w", "b"]
    for name, array in logged.items():
        expected = np.array(numbers[name], dtype)
        assert (array.dtype, array.shape, array.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("payload", ["gradients", "deltas"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_logged_is_read_back(form: str, payload: Payload, dtype: str) -> None:
    text, expected = FORMS[form]
    contribution = json_of(**{payload: {"w": text}}, **MEMBERS)
    assert plain(contribution.gradients["w"]) == expected
    logged = b"".join(safetensors.write(tensors_of(contribution, checked(dtype))))
    tensors, _ = safetensors.read(logged, dtypes=safetensors.STEP_DTYPES)
    widths = {name: array.itemsize for name, array in tensors.items() if name in ("w", "w:values")}
    assert set(widths.values()) == {1 if "int8" in form else np.dtype(dtype).itemsize}
    again = of_tensors(tensors, payload=payload, at=12.5, **MEMBERS)
    assert (again.payload, again.at) == (payload, 12.5)
    assert plain(again.gradients["w"]) == expected
    for name, value in MEMBERS.items():
        assert getattr(again, name) == value


def test_what_stands_beside_is_logged_too() -> None:
    body = {"params": {"w": W}, "hessian": [[1.0]], "hessian_diagonal": {"w": [[2.0]]}}
    tensors = tensors_of(json_of(gradients={"w": W}, **body), checked("float32"))
    again = of_tensors(tensors)
    assert again.params is not None
    assert again.hessian is not None
    assert again.hessian_diagonal is not None
    assert plain(again.params["w"]) == W
    assert plain(again.hessian) == [[1.0]]
    assert plain(again.hessian_diagonal["w"]) == [[2.0]]


def test_narrow_floats_are_logged_as_they_came() -> None:
    sent = file_of({"a": np.float16([1]), "b": np.float32([1]), "c": np.float64([1]), "d": np.float64([2])})
    tensors = tensors_of(sent, checked("float32"))
    assert {name: str(array.dtype) for name, array in tensors.items()} == {
        "a": "float16",
        "b": "float32",
        "c": "float32",
        "d": "float32",
    }


def test_the_first_fault_of_a_file_does_not_depend_on_chance() -> None:
    names = [f"t{i}" for i in range(20)]
    contribution = file_of({name: np.zeros(1) for name in names})
    assert sorted(contribution.gradients) == sorted(names)
    order = list(contribution.gradients)
    assert order == list(safetensors.read(saved({name: np.zeros(1) for name in names}))[0])
    assert Layout({name: [1] for name in order}).names == order

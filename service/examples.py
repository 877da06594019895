"""The examples of the OpenAPI document. What can be computed is computed by the code that answers real calls.

One small session goes through them: Adam on a 2 × 2 matrix and a bias, one step. Where several workers share one, it
is the same, and two of four have contributed to its second step.
"""

import base64
from functools import cache
from typing import Any, Final

import numpy as np

from core import errors as core
from core.aggregation.aggregation import Aggregation
from core.contributions import Contribution, Gradient
from core.evaluate import Evaluator
from core.layout import Array
from core.recipe import describe
from core.session import Session
from service import errors as service
from service.documents import Event, Pending, Record, Stamp
from service.problems import HeadTooLarge, MalformedRequest, MethodNotAllowed, NotFound, RequestTimeout, told
from service.replies import pending as accepted
from service.replies import server_sent
from service.schemas import parse_create
from service.wire import errors as wire
from service.wire import safetensors
from service.wire.json import dumps, loads, tensor

SESSION_ID: Final = "ses_4k2v9m7c8x3q5w6e1t0a"
OTHER_ID: Final = "ses_9d1f6h2j5l8n3p7r4s0b"
CREATED: Final = "2030-01-02T03:04:05.678901Z"
STEPPED: Final = "2030-01-02T03:04:06.789012Z"
DUE: Final = "2030-01-02T03:05:06.789012Z"
STAMP: Final = Stamp(1, "9f3c27a1b4")

CREATE: Final[dict[str, Any]] = {
    "optimizer": {"kind": "adam", "lr": 0.01},
    "params": {"w": [[0.5, -1.0], [0.25, 2.0]], "b": [0.0, 0.0]},
    "name": "tutorial",
    "labels": {"team": "vision"},
}
CREATE_BY_SHAPES: Final[dict[str, Any]] = {
    "optimizer": {"kind": "adamw", "lr": {"kind": "cosine", "init": 0.001, "steps": 10000}, "weight_decay": 0.1},
    "shapes": {"w": [784, 10], "b": [10]},
    "groups": [{"match": "b", "weight_decay": 0}],
    "averaging": {"kind": "ema", "decay": 0.999},
}
CREATE_SHARED: Final[dict[str, Any]] = CREATE | {
    "aggregation": {"mode": "sync", "workers": 4, "quorum": 3, "timeout": 60, "reduce": "median"},
}
# The privacy of one step of `private`: a test compares it with what is worked out, which needs the extra `privacy`.
PRIVACY: Final = {
    "epsilon": 4.239640834979211,
    "delta": 1e-05,
    "noise_multiplier": 1.1,
    "sampling_rate": 1.0,
    "steps": 1,
}
PATCH: Final[dict[str, Any]] = {"name": "tutorial, slower", "optimizer": {"lr": 0.001}}
STEP: Final[dict[str, Any]] = {"gradients": {"w": [[0.1, -0.2], [0.0, 0.4]], "b": [1.0, -1.0]}, "loss": 0.693}
SPARSE_STEP: Final[dict[str, Any]] = {
    "gradients": {"w": {"indices": [1], "values": [[0.3, -0.1]]}},
    "partial": True,
    "return": "none",
}
COMPRESSED_STEP: Final[dict[str, Any]] = {
    "gradients": {
        "w": {"values": [[32, -64], [0, 127]], "scale": 0.003125},
        "b": {"positions": [1], "values": [-1.0]},
    },
}
DELTAS_STEP: Final[dict[str, Any]] = {
    "deltas": {"w": [[-0.01, 0.02], [0.0, -0.04]], "b": [-0.1, 0.1]},
    "worker": "worker-3",
    "base_step": 0,
    "weight": 600,
}


def _arrays(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor(value, "") for name, value in tensors.items()}


@cache
def _stepped() -> tuple[dict[str, Any], dict[str, Any], float]:
    """The parameters and the updates of the step, and its gradient's norm."""
    document, params = parse_create(CREATE)
    session = Session.new(document.recipe, params, Evaluator())
    before = session.next_point().copy()
    checked = session.check(Contribution(_arrays(STEP["gradients"])))
    assert isinstance(checked, Gradient)
    session.apply(checked)
    after = session.next_point()
    views = session.layout.views
    return views(after), views(after - before), checked.norm


def _plain(value: object) -> Any:
    return loads(dumps(value))


def session(step: int = 0) -> dict[str, Any]:
    """The session object at step 0 or 1."""
    document, _ = parse_create(CREATE)
    recipe = document.recipe
    return {"id": SESSION_ID} | {
        **document.describe(),
        "step": step,
        "size": recipe.layout.size,
        "state_bytes": recipe.state_bytes() + recipe.layout.size * recipe.numpy_dtype.itemsize,
        "round_bytes": 0,
        "holds_params": True,
        "skipped": 0,
        "created_at": CREATED,
        "updated_at": STEPPED if step else CREATED,
    }


def private() -> dict[str, Any]:
    """The session after one step, had it been opened for workers whose contributions are to stay secret."""
    aggregation = Aggregation("sync", 4, clip_norm=1.0, noise_multiplier=1.1, seed=7)
    return session(1) | {"aggregation": describe(aggregation), "privacy": PRIVACY}


def patched() -> dict[str, Any]:
    found = session(1)
    return found | {"name": PATCH["name"], "optimizer": found["optimizer"] | PATCH["optimizer"]}


def forked() -> dict[str, Any]:
    return session(1) | {"id": OTHER_ID, "created_at": STEPPED}


def _metrics() -> dict[str, float]:
    return {"lr": 0.01, "grad_norm": _stepped()[2]}


def step_params() -> dict[str, Any]:
    return dict(_plain({"step": 1, "params": _stepped()[0], "metrics": _metrics()}))


def step_updates() -> dict[str, Any]:
    return dict(_plain({"step": 1, "updates": _stepped()[1], "metrics": _metrics()}))


def step_nothing() -> dict[str, Any]:
    return {"step": 1, "metrics": _metrics()}


def pending() -> dict[str, Any]:
    """The second contribution of four to the round after the step."""
    told: Any = loads(accepted(Pending(STAMP, 2, 2, 4, held=True), "").pieces[0])
    return dict(told)


def workers() -> dict[str, Any]:
    """One that sent the number of its examples along, and one that was not heard of for long."""
    first = {"contributions": 2, "last_seen": STEPPED, "last_step": 2, "staleness": 0, "weight": 600.0, "clock": 2}
    second = {"contributions": 1, "last_seen": CREATED, "last_step": 1, "staleness": 0, "weight": 1.0, "clock": 1}
    data = [{"worker": "worker-3", **first, "gone": False}, {"worker": "worker-4", **second, "gone": True}]
    return {"data": data, "has_more": False}


def open_round() -> dict[str, Any]:
    """Two of four have contributed, one of them without a name; one is awaited."""
    received = {"received": 2, "needed": 4, "quorum": 3, "contributed": ["worker-3"], "anonymous": 1}
    due = {"awaited": ["worker-1"], "opened_at": STEPPED, "deadline": DUE}
    return {"round": 2, "step": 1} | received | due


def params() -> dict[str, Any]:
    return dict(_plain({"step": 1, "params": _stepped()[0]}))


def preview() -> dict[str, Any]:
    """What the rate of the session by shapes will be over its first three steps."""
    document, _ = parse_create(CREATE_BY_SHAPES)
    values = Session.new(document.recipe, None, Evaluator()).preview(3)
    return {"step": 0, "first": 1, "values": values}


def preview_csv() -> str:
    values = preview()["values"]
    lines = zip(range(1, 4), *values.values(), strict=True)
    return "\r\n".join(",".join(map(str, line)) for line in [("step", *values), *lines]) + "\r\n"


def _file(tensors: dict[str, Any]) -> str:
    """A safetensors file, in base64, for JSON has no bytes."""
    pieces = safetensors.write({name: np.asarray(array, np.float32) for name, array in tensors.items()}, {})
    return base64.b64encode(b"".join(bytes(piece) for piece in pieces)).decode()


def gradients_file() -> str:
    return _file(_arrays(STEP["gradients"]))


def compressed_file() -> str:
    """The step of COMPRESSED_STEP."""
    w, b = (COMPRESSED_STEP["gradients"][name] for name in ("w", "b"))
    arrays: dict[str, Array] = {
        "w": np.array(w["values"], np.int8),
        "w:scale": np.array(w["scale"], np.float32),
        "b:positions": np.array(b["positions"], np.int64),
        "b:values": np.array(b["values"], np.float16),
    }
    return base64.b64encode(b"".join(bytes(piece) for piece in safetensors.write(arrays))).decode()


def params_file() -> str:
    return _file(_stepped()[0])


def history() -> dict[str, Any]:
    record = Record(1, STEPPED, STEP["loss"], _stepped()[2], 0.01, None)
    return {"data": [record._asdict()], "has_more": False}


def history_csv() -> str:
    return f"step,time,loss,grad_norm,lr,worker\r\n1,{STEPPED},{STEP['loss']},{_stepped()[2]},0.01,\r\n"


def events() -> str:
    came = server_sent(Event("round", STAMP.step - 1, "-", (STAMP.step, 1, 4)))
    return (came + server_sent(Event("step", STAMP.step, STAMP.commit))).decode()


# An exception for each problem, from which its example is made.
_ERRORS: Final[dict[str, Exception]] = {
    "malformed-request": MalformedRequest(),
    "head-too-large": HeadTooLarge(),
    "malformed-json": wire.MalformedJSON("an object has two members named 'lr'"),
    "malformed-encoding": wire.MalformedEncoding("the gzip data is cut short"),
    "invalid-request": service.InvalidRequest([service.Fault("/optimizer/lr", "must be at least 0")]),
    "invalid-checkpoint": core.InvalidState("the state has no tensor 'w:m'"),
    "unknown-tensor": core.UnknownTensor("weights", ["w", "b"]),
    "missing-gradient": core.MissingGradient("b"),
    "shape-mismatch": core.ShapeMismatch("w", [2, 2], [4]),
    "rows-mismatch": core.RowsMismatch("w", "tensor 'w' has rows 0 to 1"),
    "positions-mismatch": core.PositionsMismatch(
        "w", "a position in 'w' is at least 0 and less than 4, the number of its elements"
    ),
    "non-finite": core.NonFinite("w", "float32"),
    "malformed-safetensors": wire.MalformedSafetensors("the file is cut short"),
    "params-required": core.ParamsRequired("adamw works on the parameters, which this session's client holds"),
    "params-held": core.ParamsHeld("this session holds the parameters itself: leave `params` out, or PUT them"),
    "loss-required": core.LossRequired("this session's method looks at the loss: send it with the gradient, as `loss`"),
    "hessian-required": core.HessianRequired("newton needs the Hessian: send it as `hessian`"),
    "worker-required": core.WorkerRequired("who sent it decides what becomes of it here: name the `worker`"),
    "base-step-required": core.BaseStepRequired(
        "its age decides what becomes of it here: send the `base_step` of its parameters"
    ),
    "not-reducible": core.NotReducible("median compares whole contributions: leave no tensor out"),
    "stale-gradient": core.StaleGradient(41, 9, 8),
    "base-step-ahead": core.BaseStepAhead(42, 41),
    "not-pulled": core.NotPulled("worker-3", 40, 41),
    "already-contributed": core.AlreadyContributed(42, "worker-3"),
    "too-far-ahead": core.TooFarAhead("worker-3", 7, 4, 2, 41),
    "no-rounds": service.NoRounds("async"),
    "state-lost": service.StateLost(
        SESSION_ID, service.Place(41, '"41-c41e07b9aa5d2f36"'), service.Place(38, '"38-90b2d1f04c77e8aa"')
    ),
    "unknown-format": service.UnknownFormat("the session", "2", ["1"]),
    "key-reused": service.KeyReused("0b9f8a52-step-1"),
    "unsupported-media-type": service.UnsupportedMedia(
        "Content-Type", "application/x-www-form-urlencoded", ["application/json", "application/vnd.safetensors"]
    ),
    "not-acceptable": service.NotAcceptable("text/html", ["application/json", "text/csv"]),
    "body-too-large": wire.BodyTooLarge(1 << 30),
    "request-timeout": RequestTimeout(),
    "unauthenticated": service.Unauthenticated(),
    "forbidden": service.Forbidden(),
    "session-not-found": service.SessionNotFound(SESSION_ID),
    "not-found": NotFound(),
    "method-not-allowed": MethodNotAllowed("PUT", ["GET", "HEAD", "POST", "OPTIONS"]),
    "params-not-held": core.ParamsNotHeld("this session's client holds the parameters"),
    "step-conflict": service.StepConflict(2, "c41e07b9aa"),
    "overloaded": service.Overloaded("requests"),
    "quota-exceeded": service.QuotaExceeded(
        "rate", "this tenant may ask 1000 times in 60 s", service.Standing("tenant", 1000, 0, 3, window=60)
    ),
    "store-unavailable": service.StoreUnavailable(),
    "store-full": service.StoreFull(),
    "state-corrupt": service.Corrupt(),
    "internal-error": RuntimeError(),
}


METRICS: Final = """\
# HELP ravine_http_refused_total Requests refused, by the problem.
# TYPE ravine_http_refused_total counter
ravine_http_refused_total{problem="step-conflict"} 3.0
# HELP ravine_sessions_hot Sessions in the memory of this process.
# TYPE ravine_sessions_hot gauge
ravine_sessions_hot 12.0
"""
OPENMETRICS: Final = METRICS.replace("refused_total R", "refused R").replace("refused_total c", "refused c") + "# EOF\n"


def problem(slug: str, path: str) -> dict[str, Any]:
    """The problem document of `slug` as a call of `path`, which may have `{session}` in it, would give it."""
    return told(_ERRORS[slug], path.replace("{session}", SESSION_ID)).body()

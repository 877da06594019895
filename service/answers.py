"""What a sender is told of its contribution: one that became a step, was skipped, came twice, or waits in a round."""

from typing import Literal

import numpy as np

from core.layout import Array
from service.documents import Applied, Pending, Stamp, StepRequest
from service.live import ROUND, Done, Live

Returns = Literal["params", "updates", "none"]


def returns(live: Live, request: StepRequest) -> Returns:
    """What the reply is to bring."""
    if request.returns is not None:
        return request.returns
    return "updates" if live.session.state.params is None else "params"


def skipped(live: Live, request: StepRequest) -> Applied:
    """The answer to a gradient that changed nothing: things as they are, and updates of zero."""
    wanted, layout = returns(live, request), live.session.layout
    params = live.session.next_point() if wanted == "params" else None
    updates = np.full(layout.size, -0.0, live.session.recipe.numpy_dtype) if wanted == "updates" else None
    metrics = live.session.metrics()
    return Applied(live.stamp, layout, params, updates, live.session.rate(), None, metrics, skipped=True)


def replayed(live: Live, request: StepRequest, done: Done) -> Applied | Pending:
    """The answer to a repeat: the same tensors where they are still at hand, else where things stand now."""
    if done.position:
        return of_round(live, request, done.step, done.position, done.commit, replayed=True)
    wanted = returns(live, request)
    # Current parameters go with the current stamp; whatever else is told is told of the step that the key took.
    stamp = live.stamp if wanted == "params" else Stamp(done.step, done.commit)
    params = updates = None
    if wanted == "updates":
        updates = _kept(live, done.worker, done.step)
    elif wanted == "params":
        params = live.session.next_point()
    metrics = live.session.metrics()
    return Applied(stamp, live.session.layout, params, updates, done.lr, done.grad_norm, metrics, replayed=True)


def of_round(
    live: Live, request: StepRequest, round_: int, position: int, commit: str, *, replayed: bool = False
) -> Applied | Pending:
    """The answer to contribution number `position` of a round: of the step that it became, if it is closed by now.

    `commit` is the contribution's own. What is told of a round that others came after is stamped with it: an
    ETag that no state ever had, so that no If-Match holds by it.
    """
    session = live.session
    if session.state.step < round_:
        needed, held = session.recipe.aggregation.needed, session.state.params is not None
        return Pending(live.stamp, round_, position, needed, held, replayed, commit=commit)
    wanted = returns(live, request)
    point = live.point("next") if wanted == "params" else None
    # Current parameters go with the current stamp; whatever else is told is told of the round.
    stamp = live.stamp if point is not None or session.state.step == round_ else Stamp(round_, commit)
    closed = live.closed if live.closed is not None and live.closed.step == stamp.step else None
    lr, norm = (None, None) if closed is None else (closed.lr, closed.grad_norm)
    updates = _kept(live, ROUND, round_) if wanted == "updates" else None
    params = None if point is None else point.flat
    return Applied(stamp, session.layout, params, updates, lr, norm, session.metrics(), replayed, point=point)


def _kept(live: Live, worker: str, step: int) -> Array | None:
    """The updates of a step that may be asked for again, if they are still kept."""
    kept = live.kept.get(worker)
    return kept.updates if kept is not None and kept.step == step else None

"""The log entries of changes that were checked: text, tensors, and what they do to the head and the history."""

import time
from collections.abc import Iterator

import orjson

from core.aggregation.ledger import Sender
from core.contributions import FlatParams, Gradient, Pull, Reduced
from service import answers
from service import live as files
from service import tensors as forms
from service.changes import Cursor, Planned
from service.documents import Stamp, StepRequest, now
from service.ids import new_commit
from service.live import Done, Live
from service.records import LogItem, Received


def write(live: Live, plan: Planned, cursor: Cursor) -> None:
    """Gives `plan`, which was checked, its entry; moves `cursor` behind it."""
    commit, moment = new_commit(), now()
    held = live.session.state.params is not None
    text = {"commit": commit, "parent": cursor.parent, "time": moment}
    plan.item = item = LogItem(commit, text, {})
    stamp, request = Stamp(cursor.stamp.step, commit), plan.change.step
    if request is not None and isinstance(plan.checked, Gradient):
        stamp = _contribution(live, request, plan, plan.checked, item, cursor)
    elif isinstance(plan.checked, Reduced):
        stamp = Stamp(stamp.step + 1, commit)
        item.metadata |= {"kind": "close", "round": str(stamp.step)}
        plan.rate = live.session.rate()
        item.record = _record(plan, item, stamp.step, plan.checked.loss, plan.checked.norm, None)
    elif isinstance(plan.checked, Pull):
        stamp = cursor.stamp
        item.metadata |= {"kind": "pull", "worker": plan.checked.worker, "at": repr(plan.checked.at)}
    elif isinstance(plan.checked, FlatParams):
        item.metadata["kind"], held = "params", True
        item.tensors = live.session.layout.views(plan.checked.params)
    elif plan.document is not None:
        item.metadata |= {"kind": "document", "document": orjson.dumps(plan.document.describe()).decode()}
        item.head["document"] = orjson.dumps(files.describe(plan.document))
    item.head |= {"step": stamp.step, "held": int(held)}
    if stamp.commit == commit:  # a client sees that something changed
        item.head["time"] = moment
    if live.quiet:
        item.head["mark"] = stamp.commit
    cursor.stamp, cursor.parent = stamp, commit


def _contribution(
    live: Live, request: StepRequest, plan: Planned, gradient: Gradient, item: LogItem, cursor: Cursor
) -> Stamp:
    """Where the session stands then: where it stood, if the contribution goes into a round."""
    contribution, step, state = request.contribution, cursor.stamp.step, live.session.state
    aggregation = live.session.recipe.aggregation
    item.tensors = forms.tensors_of(contribution, gradient)
    item.metadata |= _text(live, request, gradient)
    if gradient.sender is not None:
        item.metadata |= _sender(gradient.sender)
        cursor.ahead(live).ledger.record(aggregation, step, gradient.sender)
    if aggregation.rounds:
        _place(live, plan, item, cursor)
    else:
        # Of the steps before it in this batch each is a move: a session in which it may not be goes one by one.
        plan.rate = live.session.rate(state.moves + step + 1 - state.step)
        item.record = _record(plan, item, step + 1, contribution.loss, gradient.norm, contribution.worker)
    if request.key is not None:
        worker = contribution.worker or ""
        plan.done = Done(request.digest, step + 1, item.commit, worker, plan.rate, gradient.norm, plan.position)
        cursor.keys[request.key] = plan.done
    return cursor.stamp if aggregation.rounds else Stamp(step + 1, item.commit)


def _place(live: Live, plan: Planned, item: LogItem, cursor: Cursor) -> None:
    """Which contribution of the round it is, and when the round is to be looked at."""
    ledger, aggregation = cursor.ahead(live).ledger, live.session.recipe.aggregation
    plan.position, moment = ledger.received, time.time()
    item.round = Received(cursor.stamp.step + 1, ledger.received, aggregation.needed)
    plan.closes = ledger.closable(aggregation, moment)
    if plan.closes:
        plan.announce = moment
    elif ledger.received == 1:
        plan.announce = ledger.deadline(aggregation)


def _text(live: Live, request: StepRequest, gradient: Gradient) -> dict[str, str]:
    """A step's own text: what came beside its tensors, and under which key."""
    contribution, text = request.contribution, {"kind": "step"}
    if contribution.loss is not None:
        text["loss"] = repr(contribution.loss)
    if contribution.partial:
        text["partial"] = "true"
    if contribution.payload != "gradients":
        text["sent"] = contribution.payload
    if request.key is not None:
        text |= {"key": request.key, "digest": request.digest, "norm": repr(gradient.norm)}
    if request.key is not None or live.session.recipe.aggregation.rounds:
        text |= {"updates": "kept"} if answers.returns(live, request) == "updates" else {}
    return text


def _sender(sender: Sender) -> Iterator[tuple[str, str]]:
    """Who sent it, and what it says of itself: what it does not say is left out."""
    worker, base_step, weight, at, pulls = sender
    if worker is not None:
        yield "worker", worker
    if base_step is not None:
        yield "base_step", str(base_step)
    if weight != 1.0:
        yield "weight", repr(weight)
    if at:
        yield "at", repr(at)
    if pulls:
        yield "pulls", "true"


def _record(plan: Planned, item: LogItem, step: int, loss: float | None, norm: float, worker: str | None) -> bytes:
    """A line of the history."""
    spent = [] if plan.epsilon is None else [plan.epsilon]
    return orjson.dumps([step, item.metadata["time"], loss, norm, plan.rate, worker, *spent, item.commit])

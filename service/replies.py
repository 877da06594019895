"""The replies of the data plane: results as JSON or safetensors, and refusals.

A session's tensors lie in one flat array in the order of its layout, all of one dtype, so the safetensors form
of any of its vectors is a header followed by that array as it is: two pieces, and no copy. Arrays of fewer than
`SMALL` elements are copied at once all the same, because the engine may write the next step over them; the
larger ones it never changes.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from core.layout import Array, Layout
from service.documents import Applied, Event, Pending, Point, Precondition, Stamp
from service.errors import StepConflict
from service.http import MEDIA_TYPES, Format, Piece, Reply
from service.problems import problem_of
from service.wire import json, safetensors

SMALL: Final = 1 << 16  # elements
WAIT: Final = 30  # seconds that a client is told to wait for a round
REPLAYED: Final = (b"ravine-replayed", b"true")
MINIMAL: Final = (b"preference-applied", b"return=minimal")
REVALIDATE: Final = ((b"cache-control", b"no-cache"), (b"vary", b"accept"))
EVENT_STREAM: Final = (
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
)

_TYPES: Final = {name: (b"content-type", types[0].encode()) for name, types in MEDIA_TYPES.items()}


def stamped(stamp: Stamp) -> list[tuple[bytes, bytes]]:
    return [(b"ravine-step", b"%d" % stamp.step), (b"etag", stamp.etag.encode())]


def document(status: int, content: Mapping[str, Any], headers: Sequence[tuple[bytes, bytes]]) -> Reply:
    """`content`, in which arrays may stand, as JSON."""
    return Reply(status, [_TYPES["json"], *headers], [json.dumps(content)])


def step(form: Format, applied: Applied) -> Reply:
    """What a step gave. It must run before the engine applies the next one."""
    headers = stamped(applied.stamp)
    if applied.replayed:
        headers.append(REPLAYED)
    told = None if applied.point is None else applied.point.encoded.get(f"round {form}")
    if told is not None:  # many workers are told the same of their round
        return Reply(200, [_TYPES[form], *headers], told)
    reply = _step(form, applied, headers)
    if applied.point is not None:
        applied.point.encoded[f"round {form}"] = reply.pieces
    return reply


def _step(form: Format, applied: Applied, headers: list[tuple[bytes, bytes]]) -> Reply:
    flat = applied.params if applied.params is not None else applied.updates
    metrics = {"lr": applied.lr, "grad_norm": applied.grad_norm, **applied.metrics}
    skipped = {"skipped": True} if applied.skipped else {}
    if form == "safetensors":
        metadata = {name: repr(float(value)) for name, value in metrics.items() if value is not None}
        metadata |= {"step": str(applied.stamp.step), **({"skipped": "true"} if skipped else {})}
        return Reply(200, [_TYPES[form], *headers], _file(applied.layout, flat, metadata))
    content: dict[str, Any] = {"step": applied.stamp.step}
    if flat is not None:
        content["updates" if applied.params is None else "params"] = applied.layout.views(flat)
    return document(200, content | {"metrics": metrics} | skipped, headers)


def pending(contribution: Pending, path: str) -> Reply:
    """A contribution that waits in a round: 202, and where its parameters will be."""
    headers = stamped(contribution.stamp)
    if contribution.held:
        params = path.removesuffix("/steps") + f"/params?after={contribution.round - 1}&wait={WAIT}"
        headers.append((b"location", params.encode()))
    if contribution.replayed:
        headers.append(REPLAYED)
    content = {"round": contribution.round, "received": contribution.received, "needed": contribution.needed}
    return document(202, content, headers)


# `Engine.step` calls these.
STEP_AS: Final = {form: partial(step, form) for form in MEDIA_TYPES}


def params(point: Point, form: Format) -> Reply:
    """The parameters at a commit, encoded once for all who read them."""
    pieces = point.encoded.get(form)
    if pieces is None:
        number = point.stamp.step
        if form == "safetensors":
            pieces = _file(point.layout, point.flat, {"step": str(number)})
        else:
            pieces = [json.dumps({"step": number, "params": point.layout.views(point.flat)})]
        point.encoded[form] = pieces
    return Reply(200, [_TYPES[form], *stamped(point.stamp), *REVALIDATE], pieces)


def unless(held: Precondition | None, point: Point, form: Format) -> Reply:
    """The parameters, unless what their reader holds by If-None-Match are these."""
    return not_modified(point.stamp) if held is not None and held.holds(point.stamp) else params(point, form)


def not_modified(stamp: Stamp) -> Reply:
    return Reply(304, [*stamped(stamp), *REVALIDATE])


def checkpoint(session: str, tensors: Mapping[str, Array], metadata: Mapping[str, str], stamp: Stamp) -> Reply:
    disposition = f'attachment; filename="{session}-{stamp.step}.safetensors"'.encode()
    headers = [_TYPES["safetensors"], (b"content-disposition", disposition), *stamped(stamp), *REVALIDATE]
    return Reply(200, headers, safetensors.write(tensors, metadata))


def server_sent(event: Event) -> bytes:
    """An event as text/event-stream has it (HTML, 9.2)."""
    more: dict[str, Any]
    if event.received is not None:
        more = dict(zip(("round", "received", "needed"), event.received, strict=True))
    else:
        more = {} if event.kind == "deleted" else {"etag": Stamp(event.step, event.commit).etag}
    data = json.dumps({"step": event.step, **more})
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.step, event.kind.encode(), data)


def refusal(error: Exception, path: str) -> Reply:
    """The problem document of `error`, with the session's stamp where that is known."""
    problem = problem_of(error, path)
    headers = problem.headers
    if isinstance(error, StepConflict):
        headers += stamped(Stamp(error.step, error.commit))
    return Reply(problem.status, headers, [problem.body_bytes()])


def _file(layout: Layout, flat: Array | None, metadata: Mapping[str, str]) -> list[Piece]:
    if flat is None:
        return safetensors.write({}, metadata)
    header = safetensors.write(layout.views(flat), metadata)[0]
    if flat.size == 0:
        return [header]
    pieces: list[Piece] = [header, flat.data.cast("B")]
    return [b"".join(pieces)] if flat.size < SMALL else pieces

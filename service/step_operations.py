"""The calls that take steps, and those that read what came of them: of the data plane, and of workers and rounds."""

from typing import Final

from service import examples
from service.operation import (
    BASE64,
    BODY,
    JSON,
    SAFETENSORS,
    SESSION,
    STAMPED,
    TENSORS,
    WRITE,
    Answer,
    Content,
    Operation,
    in_json,
    in_safetensors,
)

STEPS: Final = (
    Operation(
        method="POST",
        path="/v1/sessions/{session}/steps",
        id="takeStep",
        tag="Steps and parameters",
        summary="Send a gradient; get parameters or updates.",
        description="In JSON all members stand in the body. In safetensors the body's tensors are the gradients (or "
        "what `payload` says), and the other members are query parameters: `w:indices` (I64) and `w:values` make a "
        "row-sparse gradient of `w`, `w:positions` (I64, into the flat tensor) and `w:values` one of its largest "
        "elements alone; `w`, or these values, may be I8 with a `w:scale` beside them. `w:params` is the value of `w` "
        "where the client holds it, `:hessian` the Hessian, `w:hessian_diagonal` an estimate of its diagonal. The "
        "reply has the request's format unless Accept names another. With If-Match the step is applied only at the "
        "commit or step it names; with Idempotency-Key it is applied once, however often it is sent.\n\n"
        "Where several contributions make a step (`aggregation` of mode `sync` or `buffered`), one that does not "
        "complete its round is answered with 202, or waits for the round with `Prefer: wait=30`. In mode `ssp` that "
        "waits for the slowest workers.",
        parameters=(
            "Session",
            "IfMatch",
            "IdempotencyKey",
            "Prefer",
            "Return",
            "Loss",
            "Partial",
            "Worker",
            "BaseStep",
            "Weight",
            "Payload",
        ),
        body=(
            Content(
                JSON,
                "Step",
                {
                    "all tensors": examples.STEP,
                    "one row of one tensor": examples.SPARSE_STEP,
                    "int8 with a scale, and one element": examples.COMPRESSED_STEP,
                    "how a worker's own steps changed the parameters": examples.DELTAS_STEP,
                },
            ),
            Content(
                SAFETENSORS,
                "Safetensors",
                {
                    f"all tensors: {BASE64}": examples.gradients_file(),
                    f"int8 with a scale, and one element: {BASE64}": examples.compressed_file(),
                },
            ),
        ),
        answers={
            200: Answer(
                "The step was applied, or counted as skipped.",
                (
                    Content(
                        JSON,
                        "StepReply",
                        {
                            "the server holds the parameters": examples.step_params(),
                            "the client holds them: to be added": examples.step_updates(),
                            "return=none": examples.step_nothing(),
                        },
                    ),
                    in_safetensors("parameters or updates", examples.params_file()),
                ),
                (*STAMPED, "Ravine-Replayed", "Preference-Applied"),
            ),
            202: Answer(
                "The contribution is in the open round, and in the log; Location is where to wait for the parameters, "
                "if the server holds them. It is JSON whatever Accept says.",
                (in_json("Pending", "the second of four", examples.pending()),),
                (*STAMPED, "Location", "Ravine-Replayed", "Preference-Applied"),
            ),
        },
        problems=(
            *BODY,
            *TENSORS,
            "rows-mismatch",
            "positions-mismatch",
            "params-required",
            "params-held",
            "params-not-held",
            "hessian-required",
            "loss-required",
            "worker-required",
            "base-step-required",
            "not-reducible",
            "stale-gradient",
            "base-step-ahead",
            "not-pulled",
            "already-contributed",
            "too-far-ahead",
            "key-reused",
            "step-conflict",
            "not-acceptable",
            *SESSION,
            *WRITE,
        ),
    ),
    Operation(
        method="GET",
        path="/v1/sessions/{session}/params",
        id="getParams",
        tag="Steps and parameters",
        summary="Read the parameters, now or once there are newer ones.",
        description="`at=next` is the point at which the next gradient is to be taken, `at=final` the one to use as "
        "the result. They differ where the method says so: Nesterov's look-ahead form, a line search, schedule-free, "
        "SAM; averaging. With `worker` a session that compensates delays remembers what this worker has from now on.",
        parameters=("Session", "At", "WaitAfter", "Wait", "Puller", "IfNoneMatch"),
        answers={
            200: Answer(
                "The parameters.",
                (
                    in_json("Params", "parameters", examples.params()),
                    in_safetensors("parameters", examples.params_file()),
                ),
                STAMPED,
            ),
            304: Answer("Nothing newer: If-None-Match holds, or the time to wait is over.", (), STAMPED),
        },
        problems=(*SESSION, "params-not-held", "not-acceptable", *WRITE),
    ),
    Operation(
        method="PUT",
        path="/v1/sessions/{session}/params",
        id="putParams",
        tag="Steps and parameters",
        summary="Set the parameters, all of them.",
        description="A commit of its own; the step does not move. At step 0 this makes a session that was opened with "
        "`shapes` one that holds its parameters.",
        parameters=("Session", "IfMatch"),
        body=(
            in_json("NewParams", "parameters", {"params": examples.CREATE["params"]}),
            in_safetensors("parameters", examples.params_file()),
        ),
        answers={200: Answer("They are set.", (in_json("StepOnly", "at step 1", {"step": 1}),), STAMPED)},
        problems=(*BODY, *TENSORS, "params-not-held", "step-conflict", *SESSION, *WRITE),
    ),
    Operation(
        method="GET",
        path="/v1/sessions/{session}/state",
        id="getState",
        tag="Steps and parameters",
        summary="Download the checkpoint.",
        description="Tensor `w` (if the session holds it), its slots `w:m`, `w:v`, …, and in the metadata the recipe "
        "and the step. `POST /v1/sessions` takes the file back.",
        parameters=("Session", "IfNoneMatch"),
        answers={
            200: Answer("The checkpoint.", (in_safetensors("a checkpoint", examples.params_file()),), STAMPED),
            304: Answer("The session still stands at the commit that If-None-Match names.", (), STAMPED),
        },
        problems=(*SESSION, "not-acceptable"),
    ),
    Operation(
        method="GET",
        path="/v1/sessions/{session}/events",
        id="followEvents",
        tag="Steps and parameters",
        summary="Follow a session's steps as server-sent events.",
        description="`step` for each step, `round` when a contribution came to the open round, `deleted` at the end. "
        "The id of an event is the session's step, so a client that reconnects with Last-Event-ID misses no step; "
        "what happened in a round meanwhile is not told again.",
        parameters=("Session", "LastEventId"),
        answers={
            200: Answer(
                "A stream that ends with the session.",
                (Content("text/event-stream", "Text", {"a round that becomes a step": examples.events()}),),
            )
        },
        problems=SESSION,
        head=False,
    ),
    Operation(
        method="GET",
        path="/v1/sessions/{session}/workers",
        id="listWorkers",
        tag="Workers and rounds",
        summary="List the workers that have named themselves, by name.",
        description="Of more than 4,096 those are remembered that were seen last.",
        parameters=("Session", "Limit", "AfterWorker"),
        answers={200: Answer("A page of the list.", (in_json("WorkerList", "two workers", examples.workers()),))},
        problems=SESSION,
    ),
    Operation(
        method="GET",
        path="/v1/sessions/{session}/rounds/current",
        id="getRound",
        tag="Workers and rounds",
        summary="Read who has contributed to the open round, and who is awaited.",
        description="There is always an open round in a session of the mode `sync` or `buffered`, be it empty. Its "
        "contributions do not change the session's ETag.",
        parameters=("Session",),
        answers={
            200: Answer("The open round.", (in_json("Round", "two of four", examples.open_round()),), ("Ravine-Step",))
        },
        problems=(*SESSION, "no-rounds"),
    ),
)

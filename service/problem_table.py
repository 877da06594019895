"""The kinds of problem: slug -> status, title, what happened, and how to mend it (RFC 9457).

Which exception is which of them is in problems.py.
"""

from typing import Final, NamedTuple


class Entry(NamedTuple):
    """A line of the table. `detail`, where there is one, is told to clients in place of the exception's own words."""

    status: int
    title: str
    happened: str
    mend: str
    detail: str | None = None


PROBLEMS: Final[dict[str, Entry]] = {
    "malformed-request": Entry(
        400,
        "What came is not HTTP/1.1",
        "The request cannot be read in one way alone: its syntax is wrong, its length is told twice, its body is not "
        "in chunks as it says, or it has no Host or several. The connection is closed.",
        "Send requests with an HTTP library. Where there is a proxy between, look at what it sends on.",
        detail="the request is not well-formed HTTP/1.1",
    ),
    "malformed-json": Entry(
        400,
        "The body is not valid JSON",
        "The body is not JSON as RFC 8259 has it, or is JSON that readers disagree on: NaN or Infinity as a number, "
        "two members of one name in an object, bytes that are not UTF-8, or more than 64 levels of nesting.",
        "Write the body with a JSON library. JSON has no NaN and no infinity; send such tensors as safetensors if the "
        "session skips them, or do not send the step.",
    ),
    "malformed-encoding": Entry(
        400,
        "The compressed body cannot be inflated",
        "Content-Encoding says gzip or zstd, and the body is not that: it is corrupt, cut short, or followed by more.",
        "Send the body compressed as the header says, or leave the header out.",
    ),
    "invalid-request": Entry(
        422,
        "The request holds values that are not allowed",
        "The request was read, but something in it cannot be: an unknown member or kind, a number out of its range, a "
        "string where a number belongs. Nothing was changed.",
        "`errors` lists each fault with a JSON pointer (RFC 6901). A pointer leads into the body; one that begins with "
        "/query/ names a query parameter, one with /headers/ a header.",
    ),
    "invalid-checkpoint": Entry(
        422,
        "The checkpoint does not fit together",
        "The tensors of the file are not a state of the recipe in its metadata: one is missing, unknown, or of another "
        "shape or dtype.",
        "Send the file as GET /v1/sessions/{id}/state gave it, bytes unchanged.",
    ),
    "unknown-tensor": Entry(
        422,
        "The session has no such tensor",
        "A tensor was sent under a name that the session does not have.",
        "`tensor` is the name. `shapes` in the session object lists the tensors there are.",
    ),
    "missing-gradient": Entry(
        422,
        "A tensor is missing",
        "A tensor of the session is not in the request, which must bring all of them.",
        "Send the tensor named in `tensor`, or send `partial: true` if tensors that are left out shall keep still.",
    ),
    "shape-mismatch": Entry(
        422,
        "A tensor has another shape",
        "A tensor was sent whose shape is not that of the session's tensor.",
        "`tensor` names it, `expected` is the shape it must have, `received` the one it had.",
    ),
    "rows-mismatch": Entry(
        422,
        "The row numbers do not fit the tensor",
        "The `indices` of a row-sparse tensor are not row numbers of it.",
        "Send one flat list of integers, each at least 0 and less than the first dimension of the tensor in `tensor`.",
    ),
    "positions-mismatch": Entry(
        422,
        "The positions do not fit the tensor",
        "The `positions` of a tensor that was sent as single elements are not positions in it.",
        "Send one flat list of integers: the places in the flat, row-major tensor, each at least 0 and less than the "
        "number of elements of the tensor in `tensor`.",
    ),
    "non-finite": Entry(
        422,
        "A tensor holds NaN or infinity",
        "After the cast to the session's dtype an element of the tensor is NaN or infinite. A finite number can become "
        "infinite in the cast: float32 ends at 3.4e38. Nothing was changed.",
        'Skip the step, lower the learning rate, or clip the gradient. A session made with `non_finite: "skip"` '
        "counts such steps and goes on.",
    ),
    "malformed-safetensors": Entry(
        422,
        "The body is not a safetensors file that is read here",
        "The file is cut short, its header is over 1 MiB or names a tensor twice, its tensors overlap or leave holes, "
        "or one has a dtype that is not read.",
        "Write the file with a safetensors library, in F64, F32, F16 or BF16 (I64 for row numbers and positions). The "
        "gradients or deltas of a step may be I8 if a scale is beside them, as `w:scale`.",
    ),
    "params-required": Entry(
        422,
        "The step needs the parameters",
        "The optimizer works on the parameters (weight decay, trust ratios, averaging), and the client holds them.",
        "Send them with the step, as `params`; or give them to the session by PUT at step 0.",
    ),
    "params-held": Entry(
        422,
        "The session holds the parameters itself",
        "A step brought `params`, but this session holds its own.",
        "Leave `params` out of the step. PUT /v1/sessions/{id}/params sets them.",
    ),
    "hessian-required": Entry(
        422,
        "The step needs the Hessian",
        "The optimizer is a second-order method, and the step came without `hessian`, or without `hessian_diagonal` "
        "where that was due.",
        "Send the n × n matrix over the flat parameters as `hessian`, in the order of the session's `shapes`; or, for "
        "sophia, an estimate of its diagonal by tensor as `hessian_diagonal`.",
    ),
    "loss-required": Entry(
        422,
        "The step needs the loss",
        "The optimizer (a line search, a step size after Polyak) or a schedule (`plateau`) looks at the loss, and the "
        "step came without it.",
        "Send the loss at the point where the gradient was taken, as `loss`.",
    ),
    "worker-required": Entry(
        422,
        "The contribution does not say who sent it",
        "What becomes of a contribution goes by its worker in this session, as in mode `ssp` and where delays are "
        "compensated, and it names none.",
        "Send `worker`: a name of your own for each sender, the same in all that it sends.",
    ),
    "base-step-required": Entry(
        422,
        "The contribution does not say how old it is",
        "The session looks at the age of contributions (`max_staleness`, `staleness`); this one has no `base_step`.",
        "Send `base_step`: the step of the parameters at which the gradient was taken, `Ravine-Step` where they came.",
    ),
    "not-reducible": Entry(
        422,
        "The session's aggregation has no meaning for it",
        "A reducer that compares contributions needs whole ones; the noise of differential privacy is enough for equal "
        "weights and whole contributions alone; and a worker's parameters are whole tensors.",
        "The detail says which. Send all tensors, and no `weight`; or open a session that aggregates otherwise.",
    ),
    "key-reused": Entry(
        422,
        "The Idempotency-Key was used with another body",
        "A step with this Idempotency-Key was applied before, and its body was another.",
        "Make a new key for each step, and send the same key only with the same bytes.",
    ),
    "unsupported-media-type": Entry(
        415,
        "The body's format is not read here",
        "Content-Type or Content-Encoding names something that this call does not read.",
        "`accepted` lists what is read. curl sends a form unless told otherwise: use --json, or "
        "-H 'Content-Type: application/json'.",
    ),
    "not-acceptable": Entry(
        406,
        "No format that the client accepts",
        "Accept allows nothing that this call can send.",
        "`offered` lists what it can send. Without Accept the reply has the request's format.",
    ),
    "body-too-large": Entry(
        413,
        "The body is too large",
        "The body, as sent or once inflated, is over `limit` bytes.",
        "Send tensors as safetensors, in half precision or row-sparse; or have the operator raise the limit.",
    ),
    "request-timeout": Entry(
        408,
        "The request did not arrive in time",
        "The body came too slowly, or stopped coming.",
        "Send it again.",
        detail="the request did not arrive in time",
    ),
    "head-too-large": Entry(
        431,
        "The head of the request is too large",
        "The request line and the headers have more than 64 KiB together, or there are more than 100 headers. The "
        "connection is closed.",
        "Send what is large in the body. Cookies and headers that a proxy adds count as well.",
        detail="the request line and the headers may have 64 KiB together, and there may be 100 headers",
    ),
    "unauthenticated": Entry(
        401,
        "A valid key is needed",
        "The call came without a key, or with one that is wrong, revoked or expired. Which of these is not told.",
        "Send `Authorization: Bearer rvn_…`, once, with a key that the operator has made: `ravine keys create`.",
        detail="no valid key came with the request",
    ),
    "forbidden": Entry(
        403,
        "The key is not for this call",
        "The key is valid, but its scope does not have this call. A key of the scope `worker` contributes to its own "
        "session and pulls from it; one of the scope `session` has all calls but the operator's.",
        "Use a key of a wider scope for this call. Scopes do not change: the operator makes another key.",
        detail="the key's scope does not have this call",
    ),
    "session-not-found": Entry(
        404,
        "There is no such session",
        "The id names no session: it was deleted, or never was one.",
        "GET /v1/sessions lists the sessions there are. Ids are `ses_` and at least 20 of a-z and 0-9.",
    ),
    "not-found": Entry(
        404,
        "There is nothing at this path",
        "The path is none of the service's.",
        "GET /docs lists every path.",
        detail="there is nothing at this path",
    ),
    "method-not-allowed": Entry(
        405,
        "The path does not take this method",
        "There is such a path, but not with this method.",
        "The header Allow lists the methods that it takes.",
    ),
    "params-not-held": Entry(
        409,
        "The client holds the parameters of this session",
        "The session was made from `shapes`, so the server keeps the moments only.",
        "Read updates from the replies to steps; or, at step 0, give the parameters to the session by PUT.",
    ),
    "stale-gradient": Entry(
        409,
        "The contribution is too old",
        "It is `staleness` steps old, and the session allows `max_staleness`.",
        "Pull the parameters of `step`, take the gradient there, and send that.",
    ),
    "base-step-ahead": Entry(
        409,
        "The contribution's base step is yet to come",
        "`base_step` is greater than `step`, at which the session stands: it is of another session, or the store lost "
        "steps.",
        "Pull the parameters anew.",
    ),
    "not-pulled": Entry(
        409,
        "The worker pulled other parameters last",
        "A delay is compensated from the parameters that the worker pulled last, which are those of `step`, and its "
        "gradient is of others.",
        "Name the worker when it pulls: GET /v1/sessions/{id}/params?worker=…, or take what its step is answered with.",
    ),
    "already-contributed": Entry(
        409,
        "The worker has contributed to this round",
        "In mode `sync` each `worker` contributes once to a round, and its contribution to `round` is there.",
        "Wait for the round: GET /v1/sessions/{id}/params?after=… Send repeats with the same Idempotency-Key.",
    ),
    "too-far-ahead": Entry(
        409,
        "The worker is too far ahead of the slowest",
        "In mode `ssp` a worker at `clock` waits until the `slowest` is at most `bound` behind.",
        "Send it again later, or with `Prefer: wait=30`, which waits for the turn.",
    ),
    "no-rounds": Entry(
        404,
        "The session has no rounds",
        "In its mode each contribution is a step.",
        "Rounds are what a session of the mode `sync` or `buffered` has.",
    ),
    "step-conflict": Entry(
        412,
        "The session stands at another step",
        "If-Match names a state that is not the current one: somebody else's step was applied. Nothing was changed.",
        "`step` is where the session stands. Get the parameters, take the gradient there, and send it with their ETag.",
    ),
    "quota-exceeded": Entry(
        429,
        "A quota is used up",
        "`quota` says which, `limit` how much there may be: sessions, bytes of `state` in all sessions together, "
        "`requests` under way at once, or requests in a time (`rate`). Nothing was changed.",
        "Try again after Retry-After seconds; of a rate, `RateLimit` tells how much is left. For `sessions` and "
        "`state`, delete sessions that are done, or have the operator raise the quota.",
    ),
    "overloaded": Entry(
        503,
        "The service has too much to do",
        "More connections, requests, waits or bytes of bodies (`resource`) are under way than the service takes at "
        "once. Nothing was begun for this request, and nothing was changed.",
        "Send the same again after Retry-After seconds, and wait longer each time, by a random part of it.",
    ),
    "state-lost": Entry(
        409,
        "The store lost acknowledged steps",
        "The session was seen at `acknowledged`, and the store has another past, that leads to `found`: it failed over "
        "to a replica that had not received everything, or an older copy of it was put back. Nothing goes on until the "
        "operator has looked.",
        "Tell the operator, who sees both with `ravine sessions inspect` and lets the session go on from `found` with "
        "`ravine sessions accept`. Or DELETE it, and restore it from a checkpoint.",
    ),
    "unknown-format": Entry(
        501,
        "The session is in a format of another release",
        "A newer release wrote the session, or an entry of its log, in a `format` that this one does not read. It was "
        "not touched.",
        "Ask a service of the newer release. `supported` is what this one reads.",
    ),
    "store-unavailable": Entry(
        503,
        "The store does not answer",
        "Redis does not answer, or its disk or replicas do not where RAVINE_ACK asks for them: the service cannot tell "
        "whether a write took effect and will last.",
        "Send the same again after Retry-After seconds. With an Idempotency-Key or If-Match no step is applied twice.",
        detail="the store does not answer",
    ),
    "store-full": Entry(
        507,
        "The store is full",
        "Redis is at its memory limit and refuses to grow. Nothing was changed.",
        "Delete sessions that are done, or have the operator give the store more memory.",
        detail="the store is full",
    ),
    "state-corrupt": Entry(
        500,
        "The stored state failed its checks",
        "What the store gave back is not what was put there. Nothing is guessed from it.",
        "Restore the session from a checkpoint by POST /v1/sessions, and tell the operator.",
        detail="the stored state of this session failed its checks",
    ),
    "internal-error": Entry(
        500,
        "The service made a mistake",
        "This is a bug. The log has it under the reply's X-Request-Id.",
        "Tell the operator the X-Request-Id. Before you send a step again, GET the session to see where it stands.",
        detail="an unexpected error; the log has it under the X-Request-Id of this reply",
    ),
}

"""What schemathesis is told of this service: waits are allowed, and an hour of fuzzing is not for sitting them out."""

from typing import Any

import schemathesis

MOST = 0.1  # seconds


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    waited = case.query.get("wait") if case.query else None
    if isinstance(waited, int | float) and waited > MOST:
        case.query["wait"] = MOST
    if case.headers and "wait=" in str(case.headers.get("Prefer", "")):
        case.headers["Prefer"] = f"wait={MOST}"

"""The workers of a session, its open round and its privacy, as a client is shown them."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from service import privacy
from service.errors import NoRounds
from service.live import Live


def workers(live: Live, at: float, after: str, limit: int) -> list[dict[str, Any]]:
    """At most `limit` workers after `after`, by name; `gone` is one of which nothing was heard for `worker_timeout` at
    the time `at`.
    """
    ledger, aggregation = live.session.state.ledger, live.session.recipe.aggregation
    names = sorted(name for name in ledger.workers if name > after)[:limit]
    return [
        {
            "worker": name,
            "contributions": worker.contributions,
            "last_seen": _moment(worker.last_seen),
            "last_step": worker.last_step,
            "staleness": worker.staleness,
            "weight": worker.weight,
            "clock": worker.clock,
            "gone": ledger.gone(aggregation, name, at),
        }
        for name, worker in ((name, ledger.workers[name]) for name in names)
    ]


def open_round(live: Live, at: float) -> dict[str, Any]:
    """The open round; who is there and has not contributed is awaited. Raises NoRounds."""
    state, aggregation = live.session.state, live.session.recipe.aggregation
    if not aggregation.rounds:
        raise NoRounds(aggregation.mode)
    ledger = state.ledger
    deadline = ledger.deadline(aggregation)
    awaited = [
        name
        for name in sorted(ledger.workers)
        if name not in ledger.contributed and not ledger.gone(aggregation, name, at)
    ]
    return {
        "round": state.step + 1,
        "step": state.step,
        "received": ledger.received,
        "needed": aggregation.needed,
        "quorum": aggregation.fewest,
        "contributed": list(ledger.contributed),
        "anonymous": ledger.received - sum(ledger.contributed.values()),
        "awaited": awaited,
        "opened_at": _moment(ledger.opened_at) if ledger.received else None,
        "deadline": None if deadline is None else _moment(deadline),
    }


def privacy_of(aggregation: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What `steps` steps with the noise of `aggregation`, as it is described, cost: ε at its δ."""
    noise, delta, rate = (aggregation[name] for name in ("noise_multiplier", "delta", "sampling_rate"))
    spent = privacy.epsilon(noise, steps, delta, rate)
    return {"epsilon": spent, "delta": delta, "noise_multiplier": noise, "sampling_rate": rate, "steps": steps}


def _moment(seconds: float) -> str:
    """RFC 3339 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")

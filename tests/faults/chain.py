"""The one check of all fault tests: what clients were told, against what the store has in the end.

Every answer says at which step of which commit the session stood (`Ravine-Step`, `ETag`), under which key it was asked
for, and when. What the store has is the history, a line a step with its commit, in the order of the log; the log since
the last snapshot, whose entries name their parents; and the state. They fit together if

- the history's steps are 1, 2, 3, … and the log's entries follow one from the other (else `broken`);
- every answer names a commit that is on that line, at that step (else `broken`);
- every acknowledged key is on it once, and the step it was told is the one it has (else `lost`, `doubled`, `broken`);
- a key that was acknowledged is known when it comes again (else `lost`: what was acknowledged was forgotten meanwhile);
- what was begun after something else was acknowledged comes after it, and sees it (else `broken`);
- the parameters of each answer, and the whole state in the end, are bit for bit those of a serial replay of the
  line (else `differ`).

A session whose clients were told by `state-lost` that the store went back, to the step `found`, may have lost what came
after that step, and nothing else.

A round has one line for the contributions of all of its workers; which they must be is known, since each worker
contributes once to each.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from tests.faults.outcome import Outcome


class Reply(NamedTuple):
    """An acknowledgement: 200, or 202 where the contribution waits in a round (`pending`).

    `begun` and `ended` are moments of one clock, in seconds. `current`: step and commit say where the session stood,
    and not where a key stood that came once more. `digest`: of the tensors that came back, of None if there were none;
    `own`: they are those of the step of the key, and not of the step that is told.
    """

    key: str
    begun: float
    ended: float
    step: int
    commit: str
    replayed: bool = False
    pending: bool = False
    current: bool = True
    digest: str | None = None
    own: bool = False


class Line(NamedTuple):
    """A step of the history, and the keys of the contributions that it is made of."""

    step: int
    commit: str
    keys: tuple[str, ...]


class Entry(NamedTuple):
    """An entry of the log that was not cut yet; `key`: of the contribution that it is, if it is one."""

    commit: str
    parent: str
    key: str | None


class Replayed(NamedTuple):
    """The digests of what a serial replay gives out after each line, and of the state after the last one."""

    steps: Sequence[str]
    final: str


class Told(NamedTuple):
    """What `state-lost` said: where the session had stood, and where the store was found, as (step, commit)."""

    acknowledged: tuple[int, str]
    found: tuple[int, str]


@dataclass
class Evidence:
    """All of one session. `begun` is when each key was sent first; `counted` how many contributions of each worker the
    service itself has counted; `finals` the digests of the state as each replica gave it in the end.
    """

    session: str
    origin: str  # the commit of step 0
    head: str  # the commit at which the store stands
    rounds: bool
    begun: Mapping[str, float]
    replies: Sequence[Reply]
    lines: Sequence[Line]
    entries: Sequence[Entry] = ()
    finals: Sequence[str] = ()
    counted: Mapping[str, int] = field(default_factory=dict)
    told: Told | None = None
    hangs: int = 0
    refused: Sequence[str] = ()  # answers that no client should get


@dataclass
class Faults:
    """What does not fit. `notes` say it in words, the first few of each sort."""

    lost: int = 0
    doubled: int = 0
    broken: int = 0
    differ: int = 0
    hangs: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def any(self) -> bool:
        return any((self.lost, self.doubled, self.broken, self.differ, self.hangs))

    def add(self, kind: str, found: Iterable[str]) -> None:
        sentences = list(found)
        setattr(self, kind, getattr(self, kind) + len(sentences))
        self.notes += [f"{kind}: {sentence}" for sentence in sentences[:5]]


Replay = Callable[[Sequence[Line]], Replayed]


class Chain:
    """The line that the evidence comes to: of several lines of one step the last one written is on it."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        at = {line.step: line for line in evidence.lines}
        self.lines = [at[step] for step in sorted(at)]
        self.commits = {0: evidence.origin} | {line.step: line.commit for line in self.lines}
        self.position = {key: line.step for line in reversed(self.lines) for key in line.keys}
        self.last = self.lines[-1].step if self.lines else 0
        self.found = math.inf if evidence.told is None else evidence.told.found[0]
        self.first_reply: dict[str, Reply] = {}
        for reply in sorted(evidence.replies, key=lambda reply: reply.ended):
            self.first_reply.setdefault(reply.key, reply)

    def excused(self, reply: Reply) -> bool:
        """Whether what it tells was lost, and clients were told so."""
        return reply.step + reply.pending > self.found

    # lost and doubled

    def lost(self) -> Iterable[str]:
        for key, reply in self.first_reply.items():
            if key not in self.position and not self.excused(reply):
                yield f"{key} was acknowledged at step {reply.step} and is not on the line"
        for reply in self.evidence.replies:
            first = self.first_reply[reply.key]
            if not reply.replayed and first.ended < reply.begun and not self.twice(reply.key):
                yield f"{reply.key} was acknowledged, and was new when it came again"
        for worker, missing in self._miscounted():
            if missing > 0:
                yield from [f"{worker} has fewer contributions than acknowledgements"] * missing

    def doubled(self) -> Iterable[str]:
        for key in self.on_line:
            if self.twice(key):
                yield f"{key} is there {max(self.on_line[key], self.in_log[key])} times"
        for key in self.in_log.keys() - self.on_line.keys():
            if self.twice(key):
                yield f"{key} is in the log {self.in_log[key]} times"
        for worker, missing in self._miscounted():
            yield from [f"{worker} has more contributions than it sent"] * -missing

    def twice(self, key: str) -> bool:
        return self.on_line[key] > 1 or self.in_log[key] > 1

    @property
    def on_line(self) -> Counter[str]:
        return self._counters[0]

    @property
    def in_log(self) -> Counter[str]:
        return self._counters[1]

    @property
    def _counters(self) -> tuple[Counter[str], Counter[str]]:
        if not hasattr(self, "_counted"):
            lines = Counter(key for line in self.evidence.lines for key in line.keys)
            self._counted = lines, Counter(entry.key for entry in self.evidence.entries if entry.key is not None)
        return self._counted

    def _miscounted(self) -> Iterable[tuple[str, int]]:
        """How many contributions of a worker are missing by the service's own count."""
        if self.evidence.told is None:
            expected = Counter(key.split(" ")[0] for line in self.lines for key in line.keys)
            for worker, count in self.evidence.counted.items():
                yield worker, expected[worker] - count

    # broken

    def broken(self) -> Iterable[str]:
        yield from self.evidence.refused
        yield from self._steps()
        yield from self._entries()
        yield from self._strangers()
        yield from self._answers()
        yield from self._found()

    def _steps(self) -> Iterable[str]:
        for expected, line in enumerate(self.evidence.lines, 1):
            if line.step != expected:
                yield f"line {expected} of the history is step {line.step}"

    def _entries(self) -> Iterable[str]:
        entries = self.evidence.entries
        for before, entry in pairwise(entries):
            if entry.parent != before.commit:
                yield f"entry {entry.commit} has the parent {entry.parent} and comes after {before.commit}"
        if entries and entries[-1].commit != self.evidence.head:
            yield f"the log ends at {entries[-1].commit}, the head is {self.evidence.head}"

    def _strangers(self) -> Iterable[str]:
        for line in self.lines:
            for key in line.keys:
                if key not in self.evidence.begun:
                    yield f"nobody sent {key}, which is step {line.step}"

    def _answers(self) -> Iterable[str]:
        for reply in self.evidence.replies:
            if self.excused(reply):
                continue
            commit = self.commits.get(reply.step)
            if commit != reply.commit:
                yield f"{reply.key} was told {reply.commit} at step {reply.step}, where the line has {commit}"
            own = self.position.get(reply.key)
            if own is not None and not self._fits(reply, own):
                yield f"{reply.key} is step {own}, and was told {'that it waits at ' * reply.pending}{reply.step}"

    def _fits(self, reply: Reply, own: int) -> bool:
        if reply.pending:
            return reply.step < own
        if self.evidence.rounds or reply.replayed:
            return reply.step >= own
        return reply.step == own

    def _found(self) -> Iterable[str]:
        told = self.evidence.told
        if told is None:
            return
        if told.found[0] > told.acknowledged[0]:
            yield f"the store is said to have gone back from {told.acknowledged} to {told.found}"
        # A session that was accepted, or went on unseen, would have gone further.
        if told.found[0] != self.last or self.commits[self.last] != told.found[1]:
            yield f"the store is said to stand at {told.found}, and the line ends at {self.last}"

    # real time

    def against_time(self) -> Iterable[str]:
        """What was begun after the end of something that comes after it; once for each thing begun."""
        spans = []
        for key, step in self.position.items():
            reply = self.first_reply.get(key)
            spans.append((step, self.evidence.begun.get(key, 0.0), math.inf if reply is None else reply.ended, key))
        earliest, of_step, at = math.inf, math.inf, None
        for step, begun, ended, key in sorted(spans, reverse=True):
            if step != at:  # those of one round are in no order among themselves
                earliest, at = of_step, step
            if earliest < begun:
                yield f"{key} is step {step} and was begun after something later had been acknowledged"
            of_step = min(of_step, ended)

    def unseen(self) -> Iterable[str]:
        """Answers that show a step before one that had been told already when they were asked for."""
        answers = [reply for reply in self.evidence.replies if reply.current and not self.excused(reply)]
        ended, at, seen = sorted(answers, key=lambda reply: reply.ended), 0, 0
        for reply in sorted(answers, key=lambda reply: reply.begun):
            while ended[at].ended < reply.begun:
                seen, at = max(seen, ended[at].step), at + 1
            if reply.step < seen:
                yield f"{reply.key} was told step {reply.step} after somebody had been told {seen}"

    # bits

    def differ(self, replayed: Replayed) -> Iterable[str]:
        for reply in self.evidence.replies:
            step = self.position.get(reply.key, 0) if reply.own else reply.step
            if reply.digest is None or not 0 < step <= len(replayed.steps) or self.excused(reply):
                continue
            if reply.digest != replayed.steps[step - 1]:
                yield f"{reply.key} was given other tensors of step {step} than a replay gives"
        for final in self.evidence.finals:
            if final != replayed.final:
                yield "the state in the end is not that of a replay"


def check(evidence: Evidence, replay: Replay) -> Faults:
    """All of the above; `replay` applies lines one after the other."""
    chain, faults = Chain(evidence), Faults()
    faults.add("lost", chain.lost())
    faults.add("doubled", chain.doubled())
    faults.add("broken", chain.broken())
    faults.add("broken", chain.against_time())
    faults.add("broken", chain.unseen())
    faults.add("differ", chain.differ(replay(chain.lines)))
    faults.add("hangs", [f"{evidence.session} has somebody who got no answer"] * evidence.hangs)
    return faults


def outcome(name: str, injected: int, found: Iterable[Faults], hangs: int = 0) -> Outcome:
    """The row of a scenario; `hangs` are those that are of no session, such as a server that did not come back."""
    all_ = list(found)
    lost, doubled, broken, differ, silent = (
        sum(getattr(faults, kind) for faults in all_) for kind in ("lost", "doubled", "broken", "differ", "hangs")
    )
    return Outcome(name, injected, lost, doubled, broken, differ, hangs + silent)

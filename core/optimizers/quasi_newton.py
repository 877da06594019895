"""Quasi-Newton methods: the curvature is learned from how the gradient changes along the steps taken.

Both kinds share how they move; they differ in what they learn, and how they make a direction of it.

Without a line search each gradient is a step, u = lr · direction. With one, the method asks: after a gradient it hands
out the next trial point p + α d (`at=next`), and the gradient and the loss there either end the search (the step
u = α d is taken, and the same gradient starts the next search) or move the trial point (no step yet). So no gradient
is wasted, and each counts as one evaluation. The very first one is taken at p itself, where α = 0.

A search that finds nothing (the objective changed under it, the parameters were set anew, or p is the minimum to the
last bit) ends in a step that does not move; what was learned is forgotten, and the next gradient, at p itself, starts
again from steepest descent.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias

import numpy as np
from annotated_types import Ge, Le

from core.errors import LossRequired
from core.hyperparameters import NonNegative, Rate
from core.layout import Array
from core.optimizers import line_search
from core.optimizers.line_search import Search
from core.optimizers.rule import Beside, Own, State, Whole
from core.sums import BLOCK, dot, magnitude

LineSearch: TypeAlias = Literal["none", "strong_wolfe"]
EPSILON = float(np.finfo(np.float64).eps)
# Without a line search nothing sees to it that the curvature is positive; torch's bound.
LEAST_CURVATURE = 1e-10


@dataclass(frozen=True)
class QuasiNewton(Whole):
    """What L-BFGS and BFGS have in common.

    State: the slots `g`, the last gradient, and `d`: the last update, or with a line search the direction that is
    searched. Own arrays: `age`, the steps since the start or the last time that all was forgotten; with a line
    search also `alpha`, the step along d that is handed out, and `search`, a line_search.Search.
    """

    partial: ClassVar[bool] = False

    lr: Rate = 1.0
    line_search: LineSearch = "none"
    tolerance_grad: NonNegative = 1e-7
    tolerance_change: NonNegative = 1e-9

    # What the kinds differ in

    def learn(self, s: Array, y: Array, curvature: float, state: State) -> None:
        """Takes in a step s, the change y of the gradient along it, both (n,), and curvature = sᵀy > 0."""
        raise NotImplementedError

    def forget(self, state: State) -> None:
        """Goes back to what was known before the first step."""
        raise NotImplementedError

    def direction(self, g: Array, state: State) -> Array:
        """-H g, (n,) in float64; H is the inverse Hessian as far as it was learned."""
        raise NotImplementedError

    # What they share

    @property
    def searches(self) -> bool:
        return self.line_search == "strong_wolfe"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"loss"}) if self.searches else frozenset()

    @property
    def slots(self) -> tuple[str, ...]:
        return "d", "g"

    def own(self, n: int) -> dict[str, Own]:
        found = {"age": Own((), exact=True, whole=True)}
        if self.searches:
            found |= {"alpha": Own((), exact=True), "search": Own((line_search.SIZE,), exact=True)}
        return found

    @property
    def hands_out(self) -> bool:
        return self.searches

    def point(self, t: int, p: Array, state: State) -> Array:
        return p + along(state) if self.searches else p

    def step(self, t: int, g: Array, p: Array | None, state: State, beside: Beside) -> Array | None:
        return self._search(g, state, beside) if self.searches else self._descend(g, state, beside)

    def _descend(self, g: Array, state: State, beside: Beside) -> Array:
        """A step for each gradient, as torch's with max_iter 1."""
        if self._is_flat(g):
            return stay(g)
        self._compare(state["d"], g, state, LEAST_CURVATURE)
        self._aim(g, state, beside.lr)
        state["age"][...] += 1.0
        return state["d"].copy()

    def _search(self, g: Array, state: State, beside: Beside) -> Array | None:
        """A trial for each gradient."""
        if beside.loss is None:
            raise LossRequired
        search, update = line_search.from_array(state["search"]), None
        if not search.over:
            search = self._advanced(search, beside.loss, g, state)
            if not search.over:
                return None
            if search.phase == line_search.FAILED:
                self._start_again(state)
                self._hand_out(Search(), state)
                return stay(g)
            update = along(state)
            self._compare(update, g, state, 0.0)
            state["age"][...] += 1.0
        slope = 0.0 if self._is_flat(g) else self._aim(g, state, beside.lr)
        if slope < 0.0:
            self._hand_out(line_search.begin(beside.loss, slope, 1.0), state)
            return update
        self._hand_out(Search(), state)
        return stay(g) if update is None else update

    def _advanced(self, search: Search, loss: float, g: Array, state: State) -> Search:
        # The interval is too narrow to go on in once no parameter would move by more than tolerance_change.
        reach = float(np.abs(state["d"]).max(initial=0.0))
        narrow = self.tolerance_change / reach if reach > 0.0 else math.inf
        search = line_search.advance(search, loss, dot(g, state["d"]), narrow)
        self._hand_out(search, state)
        return search

    def _hand_out(self, search: Search, state: State) -> None:
        line_search.to_array(search, state["search"])
        state["alpha"][...] = search.step

    def _is_flat(self, g: Array) -> bool:
        return bool(np.abs(g).max(initial=0.0) <= self.tolerance_grad)

    def _compare(self, s: Array, g: Array, state: State, least: float) -> None:
        """Learns from the step s at whose end the gradient is g, if the curvature along it is positive."""
        y = g.astype(np.float64) - state["g"]
        curvature = dot(s, y)
        if max(least, EPSILON * dot(y, y)) < curvature < math.inf and math.isfinite(1.0 / curvature):
            self.learn(s, y, curvature, state)

    def _aim(self, g: Array, state: State, lr: Array) -> float:
        """Puts the next direction, times lr, into d, and g beside it. Gives the slope along d; 0: nowhere to go."""
        state["g"][...] = g
        direction = self.direction(g, state)
        if not -math.inf < dot(g, direction) < 0.0:
            self._start_again(state)
            direction = -g.astype(np.float64)
        if not self.searches and dot(g, direction) > -self.tolerance_change:
            state["d"][...] = -0.0
            return 0.0
        slope = self._keep(direction, g, state, lr)
        if not self.searches or -math.inf < slope <= 0.0:
            return slope
        # Rates that differ between the parameters turned it uphill. The least of them does not, unless it is 0.
        if lr.min() > 0.0:
            return self._keep(direction, g, state, lr.min())
        self._start_again(state)
        return self._keep(-g.astype(np.float64), g, state, lr)

    def _keep(self, direction: Array, g: Array, state: State, lr: Array) -> float:
        first = 1.0
        if state["age"] == 0.0:
            # Nothing is known of the scale yet: no farther than 1, by SciPy's norm or by torch's.
            size = math.sqrt(dot(g, g)) if self.searches else magnitude(g)
            first = 1.0 / size if size > 1.0 else 1.0
        state["d"][...] = first * lr * direction
        return dot(g, state["d"])

    def _start_again(self, state: State) -> None:
        self.forget(state)
        state["age"][...] = 0.0


def along(state: State) -> Array:
    """What the trial point, and the step that is taken once it is accepted, add to the parameters."""
    d = state["d"]
    update: Array = d.dtype.type(state["alpha"]) * d
    return update


def stay(g: Array) -> Array:
    """A step that does not move: adding -0.0 changes no bit."""
    return np.full_like(g, -0.0)


@dataclass(frozen=True)
class Lbfgs(QuasiNewton):
    """Limited-memory BFGS: the inverse Hessian is what the last `history` steps say of it, and never written out.

    `line_search`: "none" takes a step of length lr for each gradient (the first one of min(1, 1/|g|₁) · lr), as torch's
    LBFGS does with max_iter 1. "strong_wolfe" asks for gradients and losses at the points that `at=next` hands
    out, and steps once one of them fell enough and is flat enough; lr then scales the first trial of each search.
    A client whose loss is not finite at such a point sends 1e300 as the loss, and any finite gradient (zeros will do):
    the search then shrinks. The loss must be of the same objective throughout a search: of one batch, or of all data.
    `tolerance_grad`: no step where no element of the gradient is larger. `tolerance_change`: without a line search, no
    step where the loss would fall by less to first order; with one, no further trials once no parameter would move by
    more. 0 turns each off.
    """

    kind: ClassVar[str] = "lbfgs"
    formula: ClassVar[str] = (
        r"u = -\alpha H_t g,\quad H_{t+1} = (I - \rho s y^{\top}) H_t (I - \rho y s^{\top}) + \rho s s^{\top},\quad "
        r"\rho = 1 / y^{\top} s"
    )
    source: ClassVar[str] = (
        "Liu & Nocedal 1989, On the Limited Memory BFGS Method; Nocedal & Wright 2006, algorithm 7.4"
    )
    url: ClassVar[str] = "https://doi.org/10.1007/BF01589116"
    notes: ClassVar[tuple[str, ...]] = (
        "torch: line_search 'none', history 100, max_iter 1. SciPy: line_search 'strong_wolfe', history 10.",
        "torch takes a step that was not made (its tolerance_change) for one that was; here nothing is learned of it.",
    )

    history: Annotated[int, Ge(1), Le(100)] = 10

    @property
    def slots(self) -> tuple[str, ...]:
        pairs = [f"{name}{i}" for i in range(self.history) for name in "sy"]
        return (*super().slots, *pairs)

    def own(self, n: int) -> dict[str, Own]:
        """`rho`: 1/(sᵀy) of each pair, 0 where there is none; `place`: where the next goes; `scale`: of the first H."""
        rho, scale = Own((self.history,), exact=True), Own((), 1.0, exact=True)
        place = Own((), exact=True, most=self.history - 1.0, whole=True)
        return super().own(n) | {"rho": rho, "place": place, "scale": scale}

    def learn(self, s: Array, y: Array, curvature: float, state: State) -> None:
        place = int(state["place"])
        state[f"s{place}"][...], state[f"y{place}"][...] = s, y
        state["rho"][place] = 1.0 / curvature
        state["scale"][...] = curvature / dot(y, y)
        state["place"][...] = (place + 1) % self.history

    def forget(self, state: State) -> None:
        state["rho"][...], state["place"][...], state["scale"][...] = 0.0, 0.0, 1.0

    def direction(self, g: Array, state: State) -> Array:
        rho, place = state["rho"], int(state["place"])
        latest = [i % self.history for i in range(place - 1, place - 1 - self.history, -1)]
        pairs = [(rho[i], state[f"s{i}"], state[f"y{i}"]) for i in latest if rho[i] != 0.0]
        q = -g.astype(np.float64)
        shares = []
        for weight, s, y in pairs:
            shares.append(weight * dot(s, q))
            q -= np.multiply(shares[-1], y, dtype=np.float64)
        q *= state["scale"]
        for (weight, s, y), share in zip(reversed(pairs), reversed(shares), strict=True):
            q += np.multiply(share - weight * dot(y, q), s, dtype=np.float64)
        return q


@dataclass(frozen=True)
class Bfgs(QuasiNewton):
    """Broyden, Fletcher, Goldfarb & Shanno's method: the inverse Hessian as a full matrix, for n ≤ 4096.

    The options are those of `lbfgs`. Before its first change the matrix is scaled to the curvature
    found (Nocedal & Wright 2006, 6.20).
    """

    kind: ClassVar[str] = "bfgs"
    formula: ClassVar[str] = (
        r"u = -\alpha H_t g,\quad H_{t+1} = (I - \rho s y^{\top}) H_t (I - \rho y s^{\top}) + \rho s s^{\top},\quad "
        r"\rho = 1 / y^{\top} s"
    )
    source: ClassVar[str] = "Nocedal & Wright 2006, Numerical Optimization, algorithm 6.1"
    url: ClassVar[str] = "https://doi.org/10.1007/978-0-387-40065-5"
    notes: ClassVar[tuple[str, ...]] = ("SciPy: the defaults, without the scaling of the first matrix.",)
    limit: ClassVar[int | None] = 4096

    line_search: LineSearch = "strong_wolfe"

    def own(self, n: int) -> dict[str, Own]:
        """`H`: the inverse Hessian; `changes`: how often it was changed since the start."""
        return super().own(n) | {"H": Own((n, n), 1.0, square=True), "changes": Own((), exact=True)}

    def learn(self, s: Array, y: Array, curvature: float, state: State) -> None:
        inverse, s = state["H"], s.astype(np.float64)
        if state["changes"] == 0.0:
            np.fill_diagonal(inverse, curvature / dot(y, y))
        state["changes"][...] += 1.0
        bent, weight = times(inverse, y), 1.0 / curvature
        squared = weight * (1.0 + weight * dot(y, bent))
        for rows in blocks(inverse):
            change = squared * (s[rows, None] * s) - weight * (s[rows, None] * bent + bent[rows, None] * s)
            inverse[rows] = inverse[rows] + change

    def forget(self, state: State) -> None:
        inverse = state["H"]
        inverse[...] = 0.0
        np.fill_diagonal(inverse, 1.0)
        state["changes"][...] = 0.0

    def direction(self, g: Array, state: State) -> Array:
        return -times(state["H"], g)


def blocks(matrix: Array) -> list[slice]:
    """Some rows at a time, so that what is worked out beside the matrix stays small."""
    size = max(1, BLOCK // max(1, matrix.shape[1]))
    return [slice(start, start + size) for start in range(0, matrix.shape[0], size)]


def times(matrix: Array, vector: Array) -> Array:
    """matrix · vector in float64; not by BLAS, whose order of summation depends on the machine and its threads."""
    found = [np.add.reduce(matrix[rows] * vector.astype(np.float64), axis=1) for rows in blocks(matrix)]
    return np.concatenate(found)

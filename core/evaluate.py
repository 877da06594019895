"""Runs an element-wise rule over flat arrays: NumPy by blocks, or the same function compiled.

NumPy on cache-sized blocks needs 50-65 ms for an Adam step of 10 M float32 on one core; the rule compiled
into one fused loop, 13 ms. Both give the same bits: every operation is an IEEE one in the session's
dtype, done in the same order. That rests on three things, which the tests hold:

- coefficients enter as scalars of the session's dtype, so that no product is done in float64;
- the compiled loop has no fastmath, so that nothing is reordered or contracted;
- its index is unsigned: a signed one costs the check for negative indices and with it the vector code.

Compiling takes about two seconds. `run` never waits for it: it asks for a kernel by `on_missing`, goes on in
NumPy, and takes the kernel once `compile` has put it there. Numba is optional.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from core.layout import Array
from core.sums import BLOCK

Formula: TypeAlias = Callable[..., Any]
Empty: TypeAlias = Callable[[int, Any], Array]

# A compiled loop saves 5 ns an element and 10 µs a run. Below so many elements that is worth two seconds of a core only
# once there was much of it: so many elements in all, where a run counts as SETUP of them more.
WORTH_COMPILING = 16_384
MUCH, SETUP = 20_000_000, 2_000
# NumPy works a dtype's name out anew each time, which takes as long as three operations on a small array.
_NAMES = {"f": "float32", "d": "float64"}


class Spec(NamedTuple):
    """What a kernel is compiled for."""

    update: Formula
    needs_params: bool
    slots: int
    coefficients: int
    dtype: str
    add: bool  # out = p + u, or out = u
    in_place: bool = False  # out is p: a loop of its own, since the compiler gives up vector code where arrays overlap


class Run(NamedTuple):
    """One stretch of flat arrays: all are (n,), contiguous, of one dtype; `out` may be `params` itself."""

    g: Array
    params: Array | None
    slots: Sequence[Array]  # changed in place
    out: Array


class Evaluator:
    """Holds the compiled kernels of a process.

    `on_missing(spec)` is called, once for each, when a kernel would have been of use; the caller arranges for
    `compile(spec)` to run in some other thread. Without Numba, or without `on_missing`, NumPy does it all.
    `empty(size, dtype)` is where the arrays come from that new parameters are written into.
    """

    def __init__(self, on_missing: Callable[[Spec], None] | None = None, empty: Empty = np.empty) -> None:
        self.available = importlib.util.find_spec("numba") is not None
        self.empty = empty
        self._on_missing = on_missing
        self._kernels: dict[Spec, Callable[..., None]] = {}
        self._done: dict[Spec, int] = {}  # in NumPy so far: elements, with SETUP for each run

    def run(self, update: Formula, run: Run, coefficients: Sequence[float], *, needs_params: bool, add: bool) -> None:
        """Takes one step over `run`: slots change in place, `out` becomes u, or params + u if `add`.

        Coefficients are float64 and are rounded to the dtype of `run.g` here. Overflows are for the caller to ignore,
        by np.errstate: there is one around all of a step.
        """
        in_place = add and run.out is run.params
        dtype = _NAMES[run.g.dtype.char]
        spec = Spec(update, needs_params, len(run.slots), len(coefficients), dtype, add, in_place)
        kernel = self._kernels.get(spec)
        scalars = [run.g.dtype.type(value) for value in coefficients]
        if kernel is None:
            self._consider(spec, len(run.g))
            _run_blocks(update, run, scalars, needs_params=needs_params, add=add)
            return
        params = run.g if run.params is None else run.params
        kernel(run.g, params, *run.slots, *(() if in_place else (run.out,)), *scalars)

    def _consider(self, spec: Spec, size: int) -> None:
        """Asks for a kernel once it would have been of use: for one long run, or for many short ones."""
        if not self.available or self._on_missing is None:
            return
        before = self._done.get(spec, 0)
        self._done[spec] = now = before + (size + SETUP if size < WORTH_COMPILING else MUCH)
        if before < MUCH <= now:
            self._on_missing(spec)

    def compile(self, spec: Spec) -> None:
        """Compiles the kernel for `spec`, about 2 s, and puts it in use. May run in any thread."""
        if spec not in self._kernels:
            self._kernels[spec] = _compiled(spec)


def _run_blocks(update: Formula, run: Run, scalars: Sequence[Any], *, needs_params: bool, add: bool) -> None:
    if len(run.g) <= BLOCK:
        _run_block(update, run, scalars, needs_params=needs_params, add=add)
        return
    for start in range(0, len(run.g), BLOCK):
        block = slice(start, start + BLOCK)
        params = None if run.params is None else run.params[block]
        part = Run(run.g[block], params, [slot[block] for slot in run.slots], run.out[block])
        _run_block(update, part, scalars, needs_params=needs_params, add=add)


def _run_block(update: Formula, run: Run, scalars: Sequence[Any], *, needs_params: bool, add: bool) -> None:
    params = (run.params,) if needs_params and run.params is not None else ()
    u, *slots = update(run.g, *params, *run.slots, *scalars)
    for slot, value in zip(run.slots, slots, strict=True):
        slot[...] = value
    if add and run.params is not None:
        np.add(run.params, u, out=run.out)
    else:
        run.out[...] = u


def _compiled(spec: Spec) -> Callable[..., None]:
    import numba

    slots = [f"s{i}" for i in range(spec.slots)]
    scalars = [f"c{i}" for i in range(spec.coefficients)]
    elements = ["g[i]", *(["p[i]"] if spec.needs_params else []), *[f"{slot}[i]" for slot in slots], *scalars]
    results = ["u", *[f"{slot}_" for slot in slots]]
    out = "p" if spec.in_place else "out"
    arrays = ["g", "p", *slots, *([] if spec.in_place else ["out"])]
    lines = [
        f"def kernel({', '.join([*arrays, *scalars])}):",
        "    for i in range(uintp(g.size)):",
        f"        {', '.join(results)}{',' if not slots else ''} = update({', '.join(elements)})",
        *[f"        {slot}[i] = {slot}_" for slot in slots],
        f"        {out}[i] = {'p[i] + u' if spec.add else 'u'}",
    ]
    namespace: dict[str, Any] = {
        "update": numba.njit(inline="always", error_model="numpy")(spec.update),
        "uintp": numba.uintp,
    }
    exec("\n".join(lines), namespace)
    kernel = numba.njit(nogil=True, error_model="numpy")(namespace["kernel"])
    scalar = getattr(numba, spec.dtype)
    # Gradients may be views of a request's bytes, which cannot be written. A writable array passes as such a one too.
    seen, changed = numba.types.Array(scalar, 1, "C", readonly=True), numba.types.Array(scalar, 1, "C")
    before = (seen, changed) if spec.in_place else (seen, seen)
    after = (changed,) * (spec.slots + (not spec.in_place))
    kernel.compile((*before, *after) + (scalar,) * spec.coefficients)
    kernel.disable_compile()
    compiled: Callable[..., None] = kernel
    return compiled

"""What was asked for: the optimizer and everything around it, fixed until somebody changes it by name.

A recipe holds no arrays; it says which there are. `describe` turns it into plain JSON values, every default filled in.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from typing import Any, Literal

import numpy as np

from core.aggregation.aggregation import ASYNC, Aggregation
from core.averaging import Averaging
from core.bounds import numeric_fields
from core.errors import InvalidRecipe
from core.layout import BF16, Layout, Slot
from core.optimizers import ElementWise, Optimizer, TensorWise, Whole
from core.optimizers.rule import Own
from core.optimizers.wrappers import Wrapper, chain
from core.schedules import Plateau, Schedule
from core.transforms import Transform

# They remember where they went by their own updates; what else moves the parameters would not be in it.
OWN_WAY = ("lbfgs", "bfgs", "schedule_free", "asgd", "dog", "prodigy")


@dataclass(frozen=True)
class Group:
    """Hyperparameters of their own for the tensors whose name matches the glob `match`.

    The last group that matches a tensor decides for it alone. `frozen` tensors keep still, their slots too.
    """

    match: str
    overrides: Mapping[str, Any]
    frozen: bool = False


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a step does. Raises InvalidRecipe for what cannot be."""

    optimizer: Optimizer
    layout: Layout
    dtype: Literal["float32", "float64"] = "float32"
    groups: tuple[Group, ...] = ()
    averaging: Averaging | None = None
    non_finite: Literal["reject", "skip"] = "reject"
    transforms: tuple[Transform, ...] = ()
    state_dtype: Literal["bfloat16"] | None = None
    state_seed: int | None = None  # of the rounding; there must be one where there is a state_dtype
    aggregation: Aggregation = ASYNC

    def __post_init__(self) -> None:
        for index, variant in enumerate(self.variants[1:]):
            if variant.family != self.method.family:
                raise InvalidRecipe(f"/groups/{index}", "a group cannot change the matrix form of the optimizer")
            if variant.hands_out and any(wrapper.hands_out for wrapper in self.wrappers):
                raise InvalidRecipe(f"/groups/{index}", "both would say where the next gradient is to be taken")
        if isinstance(self.method, Whole) and self.method.family == "whole":
            self._check_whole(self.method)
        if self.state_dtype is not None and not self.compact:
            raise InvalidRecipe(
                "/state_dtype",
                f"the state of {self.method.kind} cannot be kept in {self.state_dtype}: "
                "that is for element-wise methods whose slots are running means",
            )
        self._check_transforms()
        self._check_aggregation()

    def _check_aggregation(self) -> None:
        if not self.aggregation.reduce.running and self.needs & {"hessian", "hessian_diagonal"}:
            raise InvalidRecipe(
                "/aggregation/reduce",
                f"{self.aggregation.reduce.kind} says nothing of the Hessians that {self.method.kind} needs",
            )
        if self.aggregation.noise_multiplier is None:
            return
        unprotected = sorted(self.needs & {"hessian", "hessian_diagonal", "loss"})
        if unprotected:
            sentence = f"there is no noise on what is needed beside the gradients: {', '.join(unprotected)}"
            raise InvalidRecipe("/aggregation/noise_multiplier", sentence)
        if any(self.mends):
            sentence = "a transform makes something of NaN or infinity, which no clip_norm and no noise hide"
            raise InvalidRecipe("/aggregation/noise_multiplier", sentence)

    def _check_transforms(self) -> None:
        for index, transform in enumerate(self.transforms):
            before = self.transforms[:index]
            hiding = [other.kind for other in before if not other.mends_nan]
            if transform.mends_nan and hiding:
                raise InvalidRecipe(
                    f"/transforms/{index}",
                    f"{transform.kind} must come before {hiding[0]}, which would take in what it is to mend",
                )
            if transform.holds_back and transform.kind in [other.kind for other in before if other.holds_back]:
                raise InvalidRecipe(f"/transforms/{index}", f"there is one already: {transform.kind} can be there once")
            if transform.follows and self.method.kind in OWN_WAY:
                raise InvalidRecipe(
                    f"/transforms/{index}", f"{self.method.kind} cannot go on from parameters that were moved under it"
                )

    def _check_whole(self, method: Whole) -> None:
        if method.limit is not None and self.layout.size > method.limit:
            raise InvalidRecipe(
                "/optimizer",
                f"{method.kind} keeps matrices over all parameters and is for at most {method.limit}; "
                f"these are {self.layout.size}",
            )
        for index, group in enumerate(self.groups):
            forbidden = sorted(set(group.overrides) - {"lr"})
            if forbidden:
                raise InvalidRecipe(
                    f"/groups/{index}/{forbidden[0]}",
                    f"{method.kind} moves all parameters at once: a group may set lr and frozen alone",
                )

    # The methods

    @cached_property
    def wrappers(self) -> list[Wrapper]:
        """Outermost first."""
        return chain(self.optimizer)[0]

    @cached_property
    def method(self) -> Optimizer:
        """The optimizer without its wrappers."""
        return chain(self.optimizer)[1]

    @cached_property
    def variants(self) -> tuple[Optimizer, ...]:
        """The method itself, and then what each group makes of it."""
        made = [self.method]
        for index, group in enumerate(self.groups):
            try:
                made.append(self.method.changed(group.overrides))
            except InvalidRecipe as error:
                raise InvalidRecipe(f"/groups/{index}{error.pointer}", error.reason) from None
            except TypeError:
                unknown = sorted(set(group.overrides) - {field.name for field in fields(self.method)})
                raise InvalidRecipe(
                    f"/groups/{index}/{unknown[0]}",
                    f"{self.method.kind} has no hyperparameter {unknown[0]!r}",
                ) from None
        return tuple(made)

    @cached_property
    def choices(self) -> dict[str, int | None]:
        """Tensor -> the index of its variant, None for a frozen one."""
        return {slot.name: self._choose(slot.name) for slot in self.layout}

    def _choose(self, name: str) -> int | None:
        chosen: int | None = 0
        for index, group in enumerate(self.groups):
            if fnmatchcase(name, group.match):
                chosen = None if group.frozen else index + 1
        return chosen

    def live(self) -> list[tuple[Slot, int]]:
        """The tensors that move, in layout order, each with the index of its variant."""
        choices = ((slot, self.choices[slot.name]) for slot in self.layout)
        return [(slot, choice) for slot, choice in choices if choice is not None]

    # What a step must bring

    @cached_property
    def needs(self) -> frozenset[str]:
        """What a step must bring or the session hold: "params", "hessian", "hessian_diagonal", "loss"."""
        parts: list[Any] = [*self.variants, *self.wrappers, *self.transforms]
        needed = frozenset[str]().union(*[part.needs for part in parts])
        needed |= {"params"} if self.averaging is not None or self.follows else set()
        return needed | {"loss"} if self.plateaus else needed

    @cached_property
    def held_only(self) -> bool:
        """Whether the session must hold the parameters."""
        methods = [*self.wrappers, self.method]
        compensated = self.aggregation.delay_compensation is not None
        return compensated or self.averaging is not None or any(method.held_only for method in methods)

    @cached_property
    def whole_only(self) -> bool:
        """Whether a step must bring the gradients of all live tensors."""
        whole = isinstance(self.method, Whole) and self.method.family == "whole" and not self.method.partial
        return whole or not all(p.partial for p in self.wrappers) or not all(p.partial for p in self.transforms)

    @cached_property
    def sequential(self) -> bool:
        """Whether what a step may be, or its rate, depends on what became of the step before it."""
        waits = self.method.family == "whole" and self.method.hands_out
        held = any(transform.holds_back for transform in self.transforms) or any(w.holds_back for w in self.wrappers)
        aggregation = self.aggregation  # what it makes of a contribution may go by where the parameters stand
        if aggregation.delay_compensation is not None or (aggregation.noise_multiplier and not aggregation.rounds):
            return True
        return waits or held or bool(self.plateaus) or "hessian_diagonal" in self.needs

    @cached_property
    def follows(self) -> bool:
        """Whether a transform changes the parameters after the update."""
        return any(transform.follows for transform in self.transforms)

    @cached_property
    def mends(self) -> tuple[bool, bool]:
        """Whether a transform makes something of (NaN, infinity) in a gradient."""
        return any(t.mends_nan for t in self.transforms), any(t.mends_infinity for t in self.transforms)

    # Schedules

    @cached_property
    def schedules(self) -> dict[str, Schedule]:
        """Path of a hyperparameter (`lr`, `base.lr`, `groups.0.lr`, `transforms.1.max_norm`) -> its schedule."""
        found = dict(self.optimizer.schedules())
        for index, group in enumerate(self.groups):
            overrides = group.overrides.items()
            found |= {f"groups.{index}.{name}": value for name, value in overrides if isinstance(value, Schedule)}
        for index, transform in enumerate(self.transforms):
            found |= dict(transform.schedules(f"transforms.{index}."))
        return found

    @cached_property
    def plateaus(self) -> dict[str, Plateau]:
        """Those of the schedules that look at the loss."""
        return {path: schedule for path, schedule in self.schedules.items() if isinstance(schedule, Plateau)}

    def path_of(self, variant: int, path: str) -> str:
        """Where the hyperparameter `path` of a variant of the method was set."""
        if variant and path.rpartition(".")[2] in self.groups[variant - 1].overrides:
            return f"groups.{variant - 1}.{path.rpartition('.')[2]}"
        return "base." * len(self.wrappers) + path

    def bounds_of(self, path: str) -> tuple[Any, ...]:
        """The bounds of the hyperparameter at `path`."""
        family, *parts = path.split(".")
        settings: Any = self.optimizer
        if family in ("groups", "transforms"):
            index = int(parts.pop(0))
            settings = self.variants[index + 1] if family == "groups" else self.transforms[index]
        else:
            parts = [family, *parts]
        for name in parts[:-1]:
            settings = getattr(settings, name)
        while parts[-1] not in vars(settings):  # a group may set what belongs to the base of its method
            settings = settings.base
        return numeric_fields(type(settings)).get(parts[-1], (float, ()))[1]

    # What the state is made of

    @cached_property
    def slots(self) -> dict[str, float]:
        """Every per-parameter array of the state -> what it is first filled with."""
        found = {slot: variant.initial(slot) for variant in reversed(self.variants) for slot in variant.slots}
        for wrapper in self.wrappers:
            found |= dict.fromkeys(wrapper.adds, 0.0)
        for name, transform in zip(self.transform_names, self.transforms, strict=True):
            found |= {f"{name}.{slot}": 0.0 for slot in transform.slots}
        if self.averaging is not None:
            found["average"] = 0.0
        return found

    @cached_property
    def transform_names(self) -> list[str]:
        """What the state of each transform is called: its kind, the second one of a kind `ema.2`."""
        names: list[str] = []
        for index, transform in enumerate(self.transforms):
            before = sum(other.kind == transform.kind for other in self.transforms[:index])
            names.append(f"{transform.kind}.{before + 1}" if before else transform.kind)
        return names

    @cached_property
    def compact(self) -> bool:
        """Whether the method's slots could be kept in bfloat16."""
        return all(
            isinstance(v, ElementWise) and v.family == "elements" and v.compact and bool(v.slots) for v in self.variants
        )

    @cached_property
    def compact_slots(self) -> frozenset[str]:
        """The slots that are kept in bfloat16."""
        if self.state_dtype is None:
            return frozenset()
        return frozenset(slot for variant in self.variants for slot in variant.slots)

    def dtype_of(self, slot: str) -> np.dtype[Any]:
        return BF16 if slot in self.compact_slots else self.numpy_dtype

    @cached_property
    def own(self) -> dict[str, Own]:
        """Every other array of the state by its whole name: `w:row` of a tensor, `:d` of all of them."""
        return dict(self._own())

    def _own(self) -> Iterator[tuple[str, Own]]:
        if isinstance(self.method, Whole) and self.method.family == "whole":
            yield from _named("", self.method.own(self.layout.size))
        for slot in self.layout:
            variant = self.variants[self.choices[slot.name] or 0]  # a frozen tensor's state keeps still as well
            if isinstance(variant, TensorWise):
                yield from _named(slot.name, variant.own(slot.shape))
            elif isinstance(variant, ElementWise):
                for name, fill in variant.scalars.items():
                    yield f"{slot.name}:{name}", Own((), fill, True, least=0.0, whole=name in variant.counts)
        for wrapper in self.wrappers:
            yield from _named("", wrapper.own())
        for name, transform in zip(self.transform_names, self.transforms, strict=True):
            yield from _named("", {f"{name}.{own}": spec for own, spec in transform.own().items()})
        for path, plateau in self.plateaus.items():
            yield f":plateau.{path}", Own((plateau.width,), exact=True)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)

    def own_dtype(self, own: Own) -> np.dtype[Any]:
        return np.dtype(np.float64) if own.exact else self.numpy_dtype

    def state_bytes(self) -> int:
        """Bytes of the whole state, without the parameters."""
        slots = sum(self.dtype_of(slot).itemsize for slot in self.slots) * self.layout.size
        return slots + sum(prod(own.shape) * self.own_dtype(own).itemsize for own in self.own.values())

    def round_bytes(self) -> int:
        """Bytes that the arrays of an open round and the workers' backups may take, at most."""
        size, item = self.layout.size, self.numpy_dtype.itemsize
        found = self.aggregation.vectors() * size * item
        if self.aggregation.rounds:
            found += 8 * size * size * ("hessian" in self.needs)
            found += size * item * (("hessian_diagonal" in self.needs) + ("params" in self.needs))
        return found

    def describe(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        return {
            "optimizer": describe(self.optimizer),
            "shapes": self.layout.shapes,
            "dtype": self.dtype,
            "state_dtype": self.state_dtype,
            "state_seed": self.state_seed,
            "groups": [
                {"match": group.match}
                | {name: describe(value) for name, value in group.overrides.items()}
                | ({"frozen": True} if group.frozen else {})
                for group in self.groups
            ],
            "averaging": describe(self.averaging),
            "non_finite": self.non_finite,
            "transforms": describe(self.transforms),
            "aggregation": {name: describe(value) for name, value in self.aggregation.members().items()},
        }


def pointer_of(path: str) -> str:
    """The JSON pointer (RFC 6901), in what `describe` gives, of a hyperparameter by its path in `schedules`."""
    inside = path.startswith(("groups.", "transforms."))
    return ("/" if inside else "/optimizer/") + path.replace(".", "/")


def _named(tensor: str, own: Mapping[str, Own]) -> Iterator[tuple[str, Own]]:
    for name, spec in own.items():
        yield f"{tensor}:{name}", spec


def describe(value: Any) -> Any:
    """A dataclass with a `kind` as {"kind": …, **fields}; a tuple as a list; anything else as it is."""
    if is_dataclass(value) and not isinstance(value, type):
        kind = {"kind": value.kind} if hasattr(value, "kind") else {}
        return kind | {member_of(field.name): describe(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [describe(item) for item in value]
    return value


def member_of(field: str) -> str:
    """What a field is called in JSON: `lambda` is no name in Python."""
    return field.removesuffix("_")

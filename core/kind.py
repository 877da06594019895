"""What optimizers, schedules and averagings have in common: a name to ask for them by, and where they are from."""

from typing import Any, ClassVar


class Kind:
    """The root of a family names its `registry`; every class below it with a `kind` is then in there.

    `formula` is LaTeX, `source` the paper, `notes` what the dialects of other libraries and printed slips are.
    """

    registry: ClassVar[dict[str, Any]]
    kind: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    url: ClassVar[str]
    notes: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, registry: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if registry is not None:
            cls.registry = registry
        elif "kind" in cls.__dict__:
            cls.registry[cls.kind] = cls

"""What can be wrong with the bytes that a client sent.

    ValueError
    └── WireError                what came over the wire cannot be used
        ├── MalformedJSON        not JSON, or JSON that no two readers agree on
        ├── InvalidValue         JSON, but a value in it is not allowed (`pointer`, `message`)
        ├── MalformedSafetensors not a safetensors file, or one that Ravine does not take
        ├── MalformedEncoding    gzip or zstd data that is corrupt, cut short or followed by something else
        └── BodyTooLarge         more bytes than allowed, before or after inflation (`limit`)

The sentences are meant for the one who sent the bytes. Which HTTP status they become is not decided here.
"""

from __future__ import annotations


class WireError(ValueError):
    """The bytes or values that were sent cannot be used."""


class MalformedJSON(WireError):
    """Not JSON (RFC 8259), or JSON of the kinds that RFC 7493 forbids because readers disagree on them."""


class InvalidValue(WireError):
    """A value in a JSON document is not allowed; `pointer` is its RFC 6901 pointer (`""` is the document)."""

    def __init__(self, pointer: str, message: str) -> None:
        super().__init__(f"{pointer}: {message}" if pointer else message)
        self.pointer = pointer
        self.message = message


class MalformedSafetensors(WireError):
    """Not a safetensors file, or one outside of what Ravine takes."""


class MalformedEncoding(WireError):
    """Compressed data that is corrupt, cut short or followed by something else."""


class BodyTooLarge(WireError):
    """The body, as sent or once inflated, has more than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body has more than {limit} bytes")
        self.limit = limit

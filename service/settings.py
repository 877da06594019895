"""Every setting once: name, default, help. The environment's names are these with RAVINE_ before them."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(value: object) -> object:
    """`16MiB`, `2GB`, `512k` or a plain number as bytes. Raises ValueError."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+)\s*([kmg]i?)?b?\s*", value, re.IGNORECASE)
    if match is None:
        raise ValueError("a size is a number with an optional unit, such as 16MiB, 2GB or 1048576")
    return int(match[1]) * _UNITS[(match[2] or "").lower()]


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=1)]


class Settings(BaseSettings):
    """Where the service listens, where its data lie, and how much it may take."""

    model_config = SettingsConfigDict(env_prefix="RAVINE_", extra="ignore")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    data: Path = Field(
        Path("ravine-data"), description="Directory of the embedded store. Not used with a Redis of your own."
    )
    redis_url: str | None = Field(
        None,
        description="Redis or Valkey to keep sessions in: redis://, rediss:// or unix://. "
        "Left out: a private Valkey is started in the data directory.",
        repr=False,
    )
    durability: Literal["snapshot", "everysec", "always"] = Field(
        "everysec",
        description="snapshot, everysec or always: the embedded store writes to the disk every minute or so, "
        "every second, or before each answer.",
    )
    memory: Bytes = Field(
        2**30, description="Memory that live sessions may take, such as 16MiB or 2GB; others wait in the store."
    )
    log_format: Literal["text", "json"] = Field("text", description="text: log lines for people; json: for machines.")
    max_body: Bytes = Field(2**30, description="Largest body of a request, before and after inflation.")
    max_state: Bytes = Field(
        4 * 2**30, description="Largest state of a session, parameters and slots, in bytes or such as 4GiB."
    )
    jit: bool = Field(True, description="Compile the optimizers of large sessions, where Numba is installed.")
    failpoints: str = Field(
        "", description="For tests of the service itself: where it is to break off. Never set it elsewhere."
    )
    drain_seconds: float = Field(
        30.0, ge=0, description="How long requests under way may take once the service was told to stop."
    )

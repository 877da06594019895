"""Every setting once: name, default, help. The environment's names are these with RAVINE_ before them."""

import re
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service import tracing
from service.access.hosts import parse_hosts
from service.access.rates import parse_rate

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


def _traceable(value: bool) -> bool:
    if value and not tracing.available():
        raise ValueError("traces need the extra `tracing`: pip install 'ravine[tracing]'")
    return value


def _workers(value: int) -> int:
    if value > 1 and sys.platform != "linux":
        raise ValueError("more than one needs Linux: connections pass from one to another by its sockets")
    return value


def _hosts(value: str) -> str:
    parse_hosts(value)
    return value


def _rate(value: str) -> str:
    parse_rate(value)
    return value


class Settings(BaseSettings):
    """Where the service listens, where its data lie, and how much it may take."""

    model_config = SettingsConfigDict(env_prefix="RAVINE_", extra="ignore")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    workers: Annotated[int, AfterValidator(_workers)] = Field(
        1, ge=1, le=256, description="Processes that serve the port together, each session in one of them."
    )
    tls_cert: Path | None = Field(None, description="Certificate (with its chain, PEM) to serve HTTPS with.")
    tls_key: Path | None = Field(None, description="The certificate's private key (PEM).")
    data: Path = Field(
        Path("ravine-data"), description="Directory of the embedded store. Not used with a Redis of your own."
    )
    redis_url: str | None = Field(
        None,
        description="Redis or Valkey to keep sessions in: redis://, rediss:// or unix://. "
        "Left out: a private Valkey is started in the data directory.",
        repr=False,
    )
    redis_url_file: Path | None = Field(
        None, description="File that holds redis_url, such as a secret that an orchestrator mounts."
    )
    keys: Literal["auto", "required", "off"] = Field(
        "auto",
        description="Whether requests need a key. auto: unless only this machine can send them, or --insecure is said.",
    )
    insecure: bool = Field(
        False, description="Serve on other addresses than loopback without asking for keys: whoever reaches it is in."
    )
    hosts: Annotated[str, AfterValidator(_hosts)] | None = Field(
        None, description="Names that Host may have where no key is asked for. Left out: this machine's, or any."
    )
    docs: bool = Field(True, description="Show /docs without a key where keys are needed.")
    ack: Literal["memory", "disk", "replicated"] = Field(
        "memory",
        description="memory, disk or replicated: a change is answered once the store has it, has it on the disk, or "
        "has it at its replicas, too.",
    )
    ack_replicas: int = Field(1, ge=1, description="How many replicas must have a change, with replicated.")
    durability: Literal["snapshot", "everysec", "always"] | None = Field(
        None,
        description="snapshot, everysec or always: the embedded store writes to the disk every minute or so, "
        "every second, or before each answer. Left out: everysec, or always with --ack disk.",
    )
    memory: Bytes = Field(
        2**30, description="Memory that live sessions may take, such as 16MiB or 2GB; others wait in the store."
    )
    log_format: Literal["text", "json"] = Field("text", description="text: log lines for people; json: for machines.")
    max_body: Bytes = Field(2**30, description="Largest body of a request, before and after inflation.")
    max_state: Bytes = Field(
        4 * 2**30, description="Largest state of a session, parameters and slots, in bytes or such as 4GiB."
    )
    max_connections: int = Field(16_384, ge=1, description="Connections held at once; beyond, 503 and closed.")
    max_requests: int = Field(1024, ge=1, description="Requests in flight at once, but those that wait; beyond, 503.")
    lag_seconds: float = Field(
        0.005,
        ge=0,
        description="Seconds that requests may wait for their turn once there were more than max_requests: while they "
        "wait longer, fewer are let in. 0: as many always.",
    )
    max_waits: int = Field(8192, ge=1, description="Long polls, event streams and waits for rounds at once.")
    max_bodies: Bytes = Field(
        4 * 2**30, description="Bodies under way, all together, as far as they have come; never less than two largest."
    )
    header_seconds: float = Field(15.0, gt=0, description="Within how many seconds a request's head must be whole.")
    stall_seconds: float = Field(
        30.0, gt=0, description="Seconds for which a body that comes, or a reply that goes, may stand still."
    )
    max_sessions: int = Field(100_000, ge=1, description="Sessions that each tenant may have.")
    max_tenant_state: Bytes | None = Field(None, description="Bytes that the states of a tenant's sessions may take.")
    rate: Annotated[str, AfterValidator(_rate)] | None = Field(
        None, description="Requests of each tenant in a time, such as 1000/second."
    )
    max_tenant_requests: int | None = Field(
        None, ge=1, description="Requests of a tenant in flight at once, in this process, but those that wait."
    )
    tracing: Annotated[bool, AfterValidator(_traceable)] = Field(
        False, description="Send traces of requests to a collector, by OTLP over HTTP; OTEL_… variables say to which."
    )
    jit: bool = Field(True, description="Compile the optimizers of large sessions, where Numba is installed.")
    failpoints: str = Field(
        "", description="For tests of the service itself: where it is to break off. Never set it elsewhere."
    )
    drain_seconds: float = Field(
        30.0, ge=0, description="How long requests under way may take once the service was told to stop."
    )

    @model_validator(mode="after")
    def _with_secrets(self) -> "Settings":
        if self.redis_url_file is not None:
            if self.redis_url is not None:
                raise ValueError("redis_url and redis_url_file are both given: one of them is enough")
            try:
                self.redis_url = self.redis_url_file.read_text("utf-8").strip()
            except (OSError, ValueError) as error:
                raise ValueError(f"redis_url_file cannot be read: {error}") from None
            if not self.redis_url:
                raise ValueError(f"redis_url_file is empty: {self.redis_url_file}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: one of them is not given")
        return self

    @model_validator(mode="after")
    def _with_ack(self) -> "Settings":
        if not self.redis_url and self.ack == "replicated":
            raise ValueError("ack=replicated needs a Redis of your own that has replicas: the embedded store has none")
        if not self.redis_url and self.ack == "disk" and self.durability not in (None, "always"):
            raise ValueError(f"ack=disk and durability={self.durability} contradict each other: leave durability out")
        return self

    @property
    def embedded_durability(self) -> Literal["snapshot", "everysec", "always"]:
        """What the embedded store is told, where nothing else was said."""
        return self.durability or ("always" if self.ack == "disk" else "everysec")

    @property
    def store_place(self) -> str:
        """Where the sessions are kept, in words, without secrets."""
        if self.redis_url:
            # a password may stand before the host or in the query
            return re.sub(r"(?<=://)[^@/]*@", "", self.redis_url.partition("?")[0])
        return str(self.data.resolve())

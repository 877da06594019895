"""What was measured, and on what: everything that the figures depend on and that names nobody's machine."""

import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.processes import ROOT
from service.valkey import EmbeddedFailed, find_binary

_PACKAGES = (
    "numpy", "numba", "uvicorn", "uvloop", "httptools", "orjson", "redis", "hiredis", "fastapi", "pydantic",
)  # fmt: skip

_WRITTEN = ("benchmarks/RESULTS.md", "benchmarks/results.json", "benchmarks/scale.json", "benchmarks/pictures")


def describe() -> dict[str, str]:
    """What stands at the head of the report. No names of hosts, users or directories."""
    return {
        "CPU": f"{_processor()}, {len(_cores())} cores",
        "Memory": f"{_memory() / 2**30:.0f} GiB",
        "Kernel": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "Packages": ", ".join(f"{name} {found}" for name in _PACKAGES if (found := _version(name))),
        "Store": f"{_valkey()}, on a unix socket, `everysec` (the default)",
        "Client": _wrk(),
        "Proxy": _nginx(),
    }


def moment() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def commit() -> str:
    """The commit's short name, and whether the tree differs from it; what the benchmarks write does not count."""
    git = ["git", "-C", str(ROOT)]
    name = _output([*git, "rev-parse", "--short", "HEAD"])
    changed = _output([*git, "status", "--porcelain", "--", ".", *[f":!{place}" for place in _WRITTEN]])
    return (name or "unknown") + (", with changes" if changed else "")


def _processor() -> str:
    found = re.search(r"^model name\s*: *(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _cores() -> list[str]:
    return re.findall(r"^processor\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)


def _memory() -> int:
    found = re.search(r"^MemTotal: *(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _valkey() -> str:
    try:
        said = _output([str(find_binary()), "--version"])
    except EmbeddedFailed:
        return "none"
    found = re.match(r"(\S+) server v=(\S+)", said)
    return f"{found[1]} {found[2]}" if found else said


def _wrk() -> str:
    """wrk has no option for its version alone: it says it before its usage."""
    found = re.match(r"wrk \S+", _output(["wrk", "-v"])) if shutil.which("wrk") else None
    return found[0] if found else "no wrk"


def _nginx() -> str:
    """It says so on standard error: "nginx version: nginx/1.22.1"."""
    found = re.search(r"nginx/(\S+)", _output(["nginx", "-v"])) if shutil.which("nginx") else None
    return f"nginx {found[1]}" if found else "no nginx"


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return (done.stdout or done.stderr).strip()

"""Replicas that start quickly (tests/nursery.py) and can be given failpoints: several hundred kills in a minute."""

from pathlib import Path

from tests.nursery import Nursery
from tests.running import Server


class Replica(Server):
    """A server out of the nursery. `arm` gives it failpoints for its next start."""

    def __init__(self, nursery: Nursery, data: Path, *arguments: str) -> None:
        super().__init__(data, *arguments)
        self._nursery = nursery
        self._failpoints = ""
        self.log.touch()

    def arm(self, failpoints: str) -> None:
        self._failpoints = failpoints

    def start(self) -> "Replica":
        arguments = ["serve", "--port", "0", "--data", str(self.data), *self._arguments]
        # Compiling takes two seconds of a core, each time anew, and changes no bit.
        environment = {"RAVINE_JIT": "false", "RAVINE_FAILPOINTS": self._failpoints}
        self.process = self._nursery.bear(arguments, environment, self.log)  # type: ignore[assignment]
        self.url = self._wait_for_url()
        return self

    def restart(self) -> "Replica":
        self.log.write_text("")
        return self.start()

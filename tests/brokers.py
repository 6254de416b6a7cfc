"""A real broker with a test's own settings, at an address of a test's own network."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from reference_server.broker import BrokerProcess, Kind
from tests.relay import eventually


class OpenBroker(BrokerProcess):
    """Lets everybody in, wherever it listens; for addresses that only a test can reach.

    ``lines`` are of ``mosquitto.conf``; each takes the place of ours with the same first word.
    """

    def __init__(
        self, kind: Kind, state_dir: Path, *lines: str, port: int = 0, bind: str = "127.0.0.1"
    ) -> None:
        """The embedded broker takes no lines."""
        assert kind == "mosquitto" or not lines, f"{kind} has no configuration file"
        # Elsewhere than on the loopback the server's own rules ask for accounts.
        super().__init__(kind, state_dir, port)
        self.bind = bind
        self._lines = lines

    def kill(self) -> None:
        """SIGKILL; ``ensure_running`` starts it again."""
        assert self.pid is not None, "it was not started"
        os.kill(self.pid, signal.SIGKILL)
        eventually(lambda: self.poll() is not None)

    def _mosquitto_config(self) -> str:
        replaced = {line.split()[0] for line in self._lines}
        ours = super()._mosquitto_config().splitlines()
        kept = [line for line in ours if line.split()[0] not in replaced]
        return "\n".join([*kept, *self._lines]) + "\n"

    def _access_lines(self) -> list[str]:
        return ["allow_anonymous true"]

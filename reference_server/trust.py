"""Tickets: the server's own mark that a device was offered a round on a base version."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from edge_sdk.errors import StateError
from edge_sdk.store import disk_errors, make_directory, write_atomically

TICKET_BYTES = 16
SECRET_BYTES = 32
SECRET_FILE = "ticket-secret"


class Tickets:
    """Issues and checks tickets; stateless, so one issued before a restart is still good."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise StateError(
                f"a ticket secret has {SECRET_BYTES} bytes, this one {len(secret)}: "
                f"delete {SECRET_FILE} in the state directory to get a new one; "
                "devices then have to be offered their round again"
            )
        self._secret = secret

    @classmethod
    def load_or_create(cls, directory: Path) -> Tickets:
        """Tickets under the secret kept in a state directory, created on first use."""
        path = make_directory(directory) / SECRET_FILE
        if not path.exists():
            write_atomically(path, secrets.token_bytes(SECRET_BYTES), mode=0o600)
        with disk_errors("read", path):
            secret = path.read_bytes()
        return cls(secret)

    def issue(self, job: str, round_number: int, device: str, base_sha: str) -> bytes:
        """The ticket of one device for one round on one base: HMAC-SHA256, first 16 bytes."""
        # Every part has its length before it, so that no two sets of parts give the same text.
        parts = [part.encode() for part in (job, str(round_number), device, base_sha)]
        text = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.new(self._secret, text, hashlib.sha256).digest()[:TICKET_BYTES]

    def check(self, ticket: bytes, job: str, round_number: int, device: str, base_sha: str) -> bool:
        """Whether ``ticket`` was issued for exactly this, compared in constant time."""
        return hmac.compare_digest(ticket, self.issue(job, round_number, device, base_sha))

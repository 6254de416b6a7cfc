"""Tickets are good for exactly what they were issued for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_sdk.errors import StateError
from reference_server.trust import SECRET_FILE, TICKET_BYTES, Tickets

BASE = "a" * 64


def test_a_ticket_is_good_for_what_it_was_issued_for_and_nothing_else() -> None:
    tickets = Tickets(b"k" * 32)
    ticket = tickets.issue("job", 3, "cam-1", BASE)
    assert len(ticket) == TICKET_BYTES
    assert tickets.check(ticket, "job", 3, "cam-1", BASE)
    assert not tickets.check(ticket, "jobs", 3, "cam-1", BASE)
    assert not tickets.check(ticket, "job", 4, "cam-1", BASE)
    assert not tickets.check(ticket, "job", 3, "cam-2", BASE)
    assert not tickets.check(ticket, "job", 3, "cam-1", "b" * 64)
    assert not tickets.check(ticket[:-1], "job", 3, "cam-1", BASE)
    assert not Tickets(b"l" * 32).check(ticket, "job", 3, "cam-1", BASE)


def test_no_two_sets_of_parts_share_a_ticket() -> None:
    tickets = Tickets(b"k" * 32)
    assert tickets.issue("job1", 1, "x", BASE) != tickets.issue("job", 11, "x", BASE)
    assert tickets.issue("job", 1, "1x", BASE) != tickets.issue("job", 11, "x", BASE)


def test_the_secret_is_private_and_survives_a_restart(tmp_path: Path) -> None:
    ticket = Tickets.load_or_create(tmp_path / "state").issue("job", 1, "x", BASE)
    path = tmp_path / "state" / SECRET_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    assert Tickets.load_or_create(tmp_path / "state").check(ticket, "job", 1, "x", BASE)
    other = Tickets.load_or_create(tmp_path / "other")
    assert not other.check(ticket, "job", 1, "x", BASE)


def test_a_damaged_secret_is_named(tmp_path: Path) -> None:
    (tmp_path / SECRET_FILE).write_bytes(b"short")
    with pytest.raises(StateError, match=r"has 32 bytes, this one 5: delete ticket-secret"):
        Tickets.load_or_create(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_secret_is_named(tmp_path: Path) -> None:
    Tickets.load_or_create(tmp_path)
    (tmp_path / SECRET_FILE).chmod(0)
    with pytest.raises(StateError, match=r"cannot read .*ticket-secret: Permission denied"):
        Tickets.load_or_create(tmp_path)

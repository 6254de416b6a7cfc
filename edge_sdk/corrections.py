"""What plans on this device turned out to cost, over what was predicted; kept for later plans.

One small JSON file in the state directory, an entry for each task and board.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import msgspec

from edge_sdk.errors import MIB, ProfileError, StateError
from edge_sdk.profile import Correction
from edge_sdk.store import disk_errors, write_atomically

MEMORY_BOUNDS, TIME_BOUNDS = (0.8, 2.0), (0.2, 5.0)
# Predictions below these say nothing about their ratio: the runtime's own noise is as large.
LEAST_MEMORY_BYTES, LEAST_TIME_S = 8 * MIB, 0.1
# Too little memory costs a round, too much only speed: believed at once upwards, slowly downwards.
SLOWLY = 0.3
MAX_FILE_BYTES, MAX_ENTRIES = 256 * 1024, 256

log = logging.getLogger("edge_sdk")


UNCORRECTED = Correction(memory=1.0, time=1.0, samples=0)


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    schema: int = 1
    corrections: dict[str, Correction] = {}


def correction_key(task: str, spec_digest: str, board: str) -> str:
    """What a correction belongs to: another model or another board has another."""
    return f"{task}/{spec_digest[:12]}/{board}"


def learnt(
    before: Correction,
    *,
    predicted_bytes: int,
    measured_bytes: int,
    predicted_s: float,
    measured_s: float,
) -> Correction:
    """The correction after one more round; predictions are given as ``before`` corrected them.

    Bytes are those above the floor. A prediction too small to judge leaves its part as it was.
    """
    memory, seconds = before.memory, before.time
    if predicted_bytes >= LEAST_MEMORY_BYTES:
        seen = memory * measured_bytes / predicted_bytes
        memory = _within(
            seen if seen > memory else memory + SLOWLY * (seen - memory), MEMORY_BOUNDS
        )
    if predicted_s > 0 and max(predicted_s, measured_s) >= LEAST_TIME_S and measured_s > 0:
        seen = seconds * measured_s / predicted_s
        # The mean of logarithms: half as long and twice as long even out.
        weight = 0.5 if before.samples else 1.0
        seconds = _within(seconds ** (1 - weight) * seen**weight, TIME_BOUNDS)
    return Correction(memory=memory, time=seconds, samples=before.samples + 1)


def _within(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1]) if math.isfinite(value) else 1.0


class Corrections:
    """The file; a damaged one is reported, ignored and written anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries = dict(self._read().corrections)

    def get(self, key: str) -> Correction | None:
        """What was learnt here for this task and board."""
        return self._entries.get(key)

    def put(self, key: str, correction: Correction) -> None:
        """Keep it; a disk that refuses costs the memory of it, not the round."""
        self._entries.pop(key, None)
        self._entries[key] = correction
        for oldest in list(self._entries)[:-MAX_ENTRIES]:
            del self._entries[oldest]
        try:
            # Not durably: it is learnt again in a round or two, and flash wears out.
            write_atomically(self._path, _encoded(self._entries), durable=False)
        except StateError as error:
            log.warning("what this round taught about costs is not kept: %s", error)

    def _read(self) -> _File:
        try:
            with disk_errors("read", self._path), self._path.open("rb") as file:
                return msgspec.json.decode(file.read(MAX_FILE_BYTES + 1), type=_File)
        except (msgspec.MsgspecError, UnicodeDecodeError, ProfileError) as error:
            log.warning("%s is damaged and ignored: %s", self._path, error)
        except StateError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                log.warning("%s is ignored: %s", self._path, error)
        return _File()


def _encoded(entries: dict[str, Correction]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(_File(corrections=entries)), indent=1) + b"\n"

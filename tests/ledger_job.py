"""A small job for the ledger's tests: a block's sum is one number and how often it was added to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reference_server.ledger import Answer, Ledger, LoadSum, SaveSum, Upload

SPEC = "5" * 64
BASE, NEXT = "a" * 64, "b" * 64
JOB = "job"

# Adds one update to the sums.
FoldOne = Callable[[LoadSum, SaveSum], None]


def count_one(ledger: Ledger, one: Upload, fold: FoldOne) -> Answer:
    """Count one update, in a transaction of its own."""

    def fold_all(load: LoadSum, save: SaveSum, numbers: Sequence[int]) -> list[list[str]]:
        assert list(numbers) == [0]
        saved: list[str] = []

        def save_and_note(block: str, num: bytes, samples: int, devices: int) -> None:
            save(block, num, samples, devices)
            saved.append(block)

        fold(load, save_and_note)
        return [saved]

    (answer,) = ledger.count_updates(JOB, [one], fold_all)
    return answer


def adding(*blocks: str, weight: int = 1, size_bytes: int = 8) -> FoldOne:
    """Add ``weight`` to one number per block; samples are the weight, too."""

    def fold(load: LoadSum, save: SaveSum) -> None:
        for block in blocks or ("one", "two"):
            known = load(block)
            total = weight + (0 if known is None else int.from_bytes(known, "little"))
            devices = 1 if known is None else devices_in[block] + 1
            devices_in[block] = devices
            save(block, total.to_bytes(size_bytes, "little"), total, devices)

    devices_in: dict[str, int] = {}
    return fold


def upload(
    device: str, *, round_number: int = 1, base: str = BASE, digest: str = "", samples: int = 10
) -> Upload:
    return Upload(
        round=round_number,
        device=device,
        base_sha=base,
        digest=digest or f"digest of {device}",
        samples=samples,
        size_bytes=100,
        metrics={"loss": 0.5},
    )


def start(ledger: Ledger, *, remaining_s: float = 60.0) -> None:
    """Job, version 0 and an open round 1."""
    ledger.open_job(JOB, SPEC, {"strategy": "full"})
    ledger.record_base(JOB, BASE)
    ledger.plan_round(JOB, base_version=0, base_sha=BASE)
    ledger.open_round(JOB, 1, remaining_s)


def count(ledger: Ledger, device: str, *blocks: str) -> Answer:
    """Count one update whose sums hold (total, devices) as two numbers."""

    def fold(load: LoadSum, save: SaveSum) -> None:
        for block in blocks or ("one", "two"):
            known = load(block) or bytes(16)
            total = int.from_bytes(known[:8], "little") + 10
            devices = int.from_bytes(known[8:], "little") + 1
            save(block, total.to_bytes(8, "little") + devices.to_bytes(8, "little"), total, devices)

    return count_one(ledger, upload(device), fold)


def sums(ledger: Ledger, round_number: int = 1) -> dict[str, tuple[int, int]]:
    """(samples, devices) by block, over all slots."""
    found: dict[str, tuple[int, int]] = {}
    for partial in ledger.partials(JOB, round_number):
        samples, devices = found.get(partial.block, (0, 0))
        assert int.from_bytes(partial.num[:8], "little") == partial.samples
        found[partial.block] = (samples + partial.samples, devices + partial.devices)
    return found


def publish(ledger: Ledger, round_number: int, version: int, sha: str, parent: str) -> None:
    ledger.close_round(JOB, round_number)
    ledger.publish(JOB, round_number, version=version, sha=sha, parent=parent)


def healthy(ledger: Ledger) -> bool:
    return all(check.ok for check in ledger.audit(JOB))

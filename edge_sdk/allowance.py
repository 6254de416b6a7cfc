"""What one round may use on this device now, and what rounds here turned out to use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import msgspec

from edge_sdk.corrections import UNCORRECTED, Corrections, correction_key, learnt
from edge_sdk.cost import CostTable
from edge_sdk.memory import Memory, available_memory
from edge_sdk.offers import plan_for
from edge_sdk.plan import Limits, Plan
from edge_sdk.process import process_held_bytes
from edge_sdk.profile import Budget, Correction, DeviceProfile, budget
from edge_sdk.ways import Engine
from edge_sdk.wire import Offer

# Near its limit a process crawls, and predictions are good to some per cent: a plan leaves this.
HEADROOM_SHARE = 0.06
# Others write to the same disk. A profile that was measured has taken as much off already.
FREE_SHARE = 0.5
# The unit of st_blocks, on every file system.
BLOCK_BYTES = 512
# After a kill, what the next plan may use above the floor, of what the last one planned there.
LOWER_SHARE = 0.7


class Allowance:
    """The limits of one device's plans: its profile, a flag, what is free, what was learnt."""

    def __init__(
        self,
        profile: DeviceProfile,
        flag_bytes: int | None,
        state_dir: Path,
        *,
        prefix_dir: Path,
        simulated: bool,
        memory: Callable[[], Memory] = available_memory,
    ) -> None:
        """``simulated``: the profile is that of another machine; nothing is learnt for it here.

        ``memory`` reads what this machine has and what of it is free.
        """
        self._memory = memory
        self._profile, self._flag_bytes, self._simulated = profile, flag_bytes, simulated
        self._state_dir, self._prefix_dir = state_dir, prefix_dir
        self._corrections = Corrections(state_dir / "corrections.json")
        self._seen: dict[str, tuple[str, int]] = {}
        self._filled: tuple[str, ...] = ()
        self._filled_in_memory = False
        self._engines = engines()

    def budget(self, trainer_pid: int | None) -> Budget:
        """Memory the trainer may use now: what is free, and what it holds already.

        The pages of files it has mapped count as free: the kernel may take them.
        """
        memory = self._memory()
        held_bytes = process_held_bytes(trainer_pid) if trainer_pid is not None else 0
        available, group = memory.available_bytes, memory.cgroup_free_bytes
        return budget(
            self._profile,
            available_bytes=None if available is None else available + held_bytes,
            cgroup_limit_bytes=None if group is None else group + held_bytes,
            flag_bytes=self._flag_bytes,
        )

    def most(self) -> Budget:
        """What the trainer may use at the very most, were nobody else here."""
        memory = self._memory()
        return budget(
            self._profile,
            available_bytes=memory.total_bytes,
            cgroup_limit_bytes=memory.cgroup.limit_bytes if memory.cgroup else None,
            flag_bytes=self._flag_bytes,
        )

    def storage_bytes(self) -> int:
        """What kept output of frozen blocks may take: no more than the disk has room for now."""
        claimed_bytes = self._profile.storage_bytes
        if self._simulated:
            return claimed_bytes
        try:
            free_bytes = shutil.disk_usage(self._state_dir).free
            kept = self._prefix_dir.rglob("*")
            # Files are made whole before they are filled.
            held_bytes = sum(BLOCK_BYTES * path.lstat().st_blocks for path in kept)
        except OSError:
            return 0
        return min(claimed_bytes, held_bytes + int(FREE_SHARE * free_bytes))

    def plan(
        self,
        offer: Offer,
        table: CostTable,
        allowed: Budget,
        *,
        floor_bytes: int,
        num_examples: int,
        left_s: float,
        fetch_bytes: int = 0,
        ceiling_bytes: int | None = None,
    ) -> Plan:
        """The plan for an offer with ``left_s`` to its deadline; EdgeError when there is none.

        ``ceiling_bytes`` is a budget for training alone.
        """
        limits = limits_of(
            self._profile,
            allowed,
            floor_bytes=floor_bytes,
            deadline_s=left_s,
            correction=self.correction(table),
            available_engines=self._engines,
        )
        limits = msgspec.structs.replace(
            limits,
            storage_bytes=self.storage_bytes(),
            fetch_bytes=fetch_bytes,
            unchanged_rounds=self._unchanged_rounds(),
            filled_prefix=self._filled,
        )
        if ceiling_bytes is not None:
            training_bytes = int(ceiling_bytes * (1 - HEADROOM_SHARE))
            limits = msgspec.structs.replace(limits, training_bytes=training_bytes)
        return plan_for(offer, table, limits, num_examples)

    def run_whole(self) -> None:
        """The frozen blocks of this task cannot be run apart after all."""
        self._engines = ()

    def offered(self, offer: Offer) -> None:
        """Note which blocks are as they were in the round before; once for each round."""
        before, self._seen = self._seen, {}
        for entry in offer.blocks:
            sha256, rounds = before.get(entry.name, ("", 0))
            same = sha256 == entry.sha256
            self._seen[entry.name] = (entry.sha256, rounds + 1 if same else 0)
        if any(self._seen.get(name, ("", 0))[1] == 0 for name in self._filled):
            self._filled = ()

    def trained(self, plan: Plan) -> None:
        """The plan was carried out: what it was to keep of its prefix is kept."""
        if plan.prefix.cache != "none" and plan.steps is None:
            self._filled, self._filled_in_memory = plan.prefix.blocks, plan.prefix.cache == "memory"

    def trainer_ended(self) -> None:
        """What was kept in its memory is gone."""
        if self._filled_in_memory:
            self._filled = ()

    def _unchanged_rounds(self) -> dict[str, int]:
        return {name: rounds for name, (_, rounds) in self._seen.items() if rounds}

    def correction(self, table: CostTable) -> Correction:
        """What was learnt here for this task, else what the profile says."""
        own = None if self._simulated else self._corrections.get(self._key(table))
        return own or self._profile.corrections.get(table.task, UNCORRECTED)

    def learn(
        self,
        table: CostTable,
        plan: Plan,
        used: Correction,
        *,
        floor_bytes: int,
        peak_bytes: int,
        train_s: float = 0.0,
    ) -> None:
        """Correct later plans by what this one cost; ``used`` corrected it. No time: unfinished."""
        if self._simulated:
            return
        correction = learnt(
            used,
            predicted_bytes=plan.peak_bytes - floor_bytes,
            measured_bytes=max(0, peak_bytes - floor_bytes),
            predicted_s=plan.train_s,
            measured_s=train_s,
        )
        self._corrections.put(self._key(table), correction)

    def _key(self, table: CostTable) -> str:
        return correction_key(table.task, table.spec.digest(), self._profile.name)


@cache
def engines() -> tuple[Engine, ...]:
    """What is installed here that can run a frozen prefix."""
    if find_spec("onnxruntime") is None:
        return ("torch",)
    return ("torch", "onnx") if find_spec("onnx") is None else ("torch", "onnx", "onnx_int8")


def lowered(floor_bytes: int, above_bytes: float) -> int:
    """The budget under which a plan takes clearly less above the floor than this."""
    return int((floor_bytes + LOWER_SHARE * above_bytes) / (1 - HEADROOM_SHARE))


def limits_of(
    profile: DeviceProfile,
    allowed: Budget,
    *,
    floor_bytes: int,
    deadline_s: float,
    correction: Correction = UNCORRECTED,
    available_engines: tuple[Engine, ...] = ("torch",),
) -> Limits:
    """What a device of this profile may spend on a round, as its agent would say."""
    return Limits(
        memory_bytes=int(allowed.memory_bytes * (1 - HEADROOM_SHARE)),
        bound_by=allowed.bound_by,
        floor_bytes=floor_bytes,
        flops_per_s=profile.flops_per_s,
        memory_bandwidth_bytes_per_s=profile.memory_bandwidth_bytes_per_s,
        rates=profile.rates,
        overhead=profile.overhead,
        uplink_bytes_per_s=profile.uplink_bytes_per_s,
        downlink_bytes_per_s=profile.downlink_bytes_per_s,
        storage_bytes=profile.storage_bytes,
        storage_write_bytes_per_s=profile.storage_write_bytes_per_s,
        storage_read_bytes_per_s=(
            profile.storage_read_bytes_per_s or profile.storage_write_bytes_per_s
        ),
        deadline_s=deadline_s,
        engines=available_engines,
        memory_correction=correction.memory,
        time_correction=correction.time,
    )

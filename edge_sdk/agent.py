"""The device's main loop: one queue in, the session's effects out.

Three threads meet in one queue: paho's network thread and the trainer's reader only enqueue, this
loop decides. Everything that must survive a crash is on disk before it is said: blocks in the
cache, the update in the spool.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_sdk import __version__
from edge_sdk.assignment import Damaged, Down, Fits, GaveUp, Outcome
from edge_sdk.brokers import broker_profile
from edge_sdk.errors import (
    ConfigError,
    MalformedMessage,
    Refused,
)
from edge_sdk.fetch import Fetch
from edge_sdk.link import Arrived, LinkDown, LinkUp, TakenOver
from edge_sdk.mqtt import Link
from edge_sdk.outbox import Outbox, piece_limit_bytes
from edge_sdk.process import process_peak_bytes
from edge_sdk.profile import DeviceProfile
from edge_sdk.session import Effect, Event, Phase, Retry, transition
from edge_sdk.store import BlockCache, Newest, Spool, SpoolEntry
from edge_sdk.supervisor import Supervisor
from edge_sdk.trainer import Described, Setup, Trained, TrainerDied, TrainerSaid
from edge_sdk.wire import (
    Decline,
    Head,
    Hello,
    Offer,
    Piece,
    Presence,
    Receipt,
    Refusal,
    Tally,
    Topics,
    Want,
    Welcome,
    decode,
    encode,
)

# A flash card that damages one block is fetched for again; a source of wrong blocks is given up.
MAX_DAMAGED = 5
# How long a device waits for a receipt after the job is over.
LAST_RECEIPT_S = 30.0

log = logging.getLogger("edge_sdk")


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """What ``edge-sdk run`` was asked to do."""

    url: str
    job: str
    device: str
    task_path: Path
    state_dir: Path
    profile: DeviceProfile
    part: int = 0
    parts: int = 1
    memory_bytes: int | None = None
    threads: int = 1
    nursery: str | None = None
    ca_file: str | None = None
    broker_profile: str = "generic"
    report: Callable[[dict[str, Any]], None] = field(default=lambda event: None)


class Agent:
    """One device of one job."""

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._rng = random.Random()
        self._topics = Topics(settings.job)
        self._session_id = time.time_ns() // 1000
        self._cache = BlockCache(settings.state_dir / "blocks")
        self._spool = Spool(settings.state_dir / "spool")
        self._newest = Newest(settings.state_dir, settings.job)
        self._cache.sweep()
        self._spool.sweep()
        self._supervisor = self._make_supervisor()
        self._link = self._make_link()
        self._phase = Phase.IDLE
        self._offer: Offer | None = None
        self._waiting: Offer | None = None
        self._fetch, self._outbox = self._make_fetch(), self._make_outbox()
        self._hello = Retry(self._rng, 2.0)
        self._fetch_bytes = 0
        self._last_receipt = -1
        self._boot = ""
        self._why = ""
        self._damaged, self._deadline_at_s = 0, 0.0
        self._up_mark = self._down_mark = 0
        self._cpu_mark_s = 0.0
        self._done_at_s: float | None = None

    def run(self) -> None:
        """Take part until the job is over; raises what the user can fix or has to know."""
        self._supervisor.start()
        self._link.subscribe(self._topics.down(self._settings.device))
        self._link.subscribe(self._topics.head)
        self._link.start()
        try:
            while not self._finished():
                self._handle(self._next())
                # What waits in the queue must not look overdue.
                while not self._inbox.empty():
                    self._handle(self._inbox.get())
                self._repeat()
        finally:
            self._supervisor.stop()
            self._say(Presence(state="sleeping", session=self._session_id))
            self._link.close()

    def _make_supervisor(self) -> Supervisor:
        mine = self._settings
        setup = Setup(
            job=mine.job,
            task_path=str(mine.task_path),
            part=mine.part,
            parts=mine.parts,
            cache_dir=str(mine.state_dir / "blocks"),
            spool_dir=str(mine.state_dir / "spool"),
            prefix_dir=str(mine.state_dir / "prefix"),
            storage_bytes=mine.profile.storage_bytes,
            threads=mine.threads,
        )
        return Supervisor(
            setup,
            mine.profile,
            self._inbox,
            mine.report,
            state_dir=mine.state_dir,
            flag_bytes=mine.memory_bytes,
            nursery=mine.nursery,
        )

    def _make_link(self) -> Link:
        mine = self._settings
        will = encode(Presence(state="lost", session=self._session_id))
        return Link(
            mine.url,
            mine.device,
            self._inbox,
            will=(self._topics.presence(mine.device), will),
            rng=self._rng,
            ca_file=mine.ca_file,
            limits=broker_profile(mine.broker_profile),
        )

    def _make_fetch(self) -> Fetch:
        return Fetch(
            self._cache,
            self._link,
            self._topics,
            self._settings.device,
            self._rng,
            time.monotonic,
        )

    def _make_outbox(self) -> Outbox:
        return Outbox(
            self._spool,
            self._link,
            self._topics,
            self._settings.device,
            self._rng,
            time.monotonic,
            piece_limit_bytes(self._settings.profile.uplink_bytes_per_s),
        )

    # -- the loop ---------------------------------------------------------------------------

    def _next(self) -> Any:
        now_s = time.monotonic()
        times = (
            self._hello.due_s, self._outbox.due_s(), self._fetch.due_s(), self._supervisor.due_s()
        )  # fmt: skip
        due = [t for t in times if t is not None]
        if self._done_at_s is not None:
            due.append(self._done_at_s + LAST_RECEIPT_S)
        try:
            return self._inbox.get(timeout=max(0.0, min(due) - now_s) if due else None)
        except queue.Empty:
            return None

    def _handle(self, event: Any) -> None:
        if isinstance(event, Arrived):
            self._arrived(event)
        elif isinstance(event, LinkUp):
            self._link_up()
        elif isinstance(event, LinkDown):
            log.info("link down: %s", event.reason)
        elif isinstance(event, TakenOver):
            raise Refused(
                f"another client connects as device {self._settings.device!r}: each device needs "
                "its own --device and --state"
            )
        elif isinstance(event, (TrainerSaid, TrainerDied)):
            self._outcome(self._supervisor.heard(event))

    def _repeat(self) -> None:
        now_s = time.monotonic()
        if self._hello.is_due(now_s):
            self._greet()
        self._outbox.pump()
        self._fetch.repeat()
        self._outcome(self._supervisor.watch(now_s))

    def _finished(self) -> bool:
        if self._done_at_s is None:
            return False
        overdue = time.monotonic() > self._done_at_s + LAST_RECEIPT_S
        if self._outbox.entry is not None and overdue:
            log.warning("the job is over; one update has no receipt and stays in the spool")
        return self._outbox.entry is None or overdue

    def _step(self, event: Event) -> None:
        self._phase, effects = transition(self._phase, event)
        for effect in effects:
            _EFFECTS[effect](self)

    def _say(self, message: Any, retain: bool = False) -> bool:
        device = self._settings.device
        if isinstance(message, Presence):
            return self._link.publish(self._topics.presence(device), encode(message), retain=True)
        return self._link.publish(self._topics.up(device), encode(message), retain=retain)

    # -- what arrives -----------------------------------------------------------------------

    def _arrived(self, event: Arrived) -> None:
        try:
            message = decode(event.payload)
        except MalformedMessage as error:
            log.warning("dropped a message on %s: %s", event.topic, error)
            return
        if event.topic == self._topics.head:
            if isinstance(message, Head):
                self._head(message)
            return
        handler = _HANDLERS.get(type(message))
        if handler is not None:
            handler(self, message)

    def _link_up(self) -> None:
        log.info("connected, MQTT %s", self._link.protocol)
        self._greet()
        self._outbox.reconnected()
        self._fetch.reconnected()

    def _greet(self) -> None:
        described = self._supervisor.described
        if described is None or not self._link.connected:
            self._hello.answered()
            return
        self._presence()
        profile = self._settings.profile
        self._say(
            Hello(
                session=self._session_id,
                sdk=__version__,
                profile=profile.name,
                memory_bytes=self._supervisor.budget().memory_bytes,
                flops_per_s=profile.flops_per_s,
                spec_digest=described.table.spec.digest(),
                num_examples=described.num_examples,
            )
        )
        self._hello.arm(time.monotonic())

    def _presence(self) -> None:
        busy = self._phase is Phase.TRAINING
        self._say(Presence(state="training" if busy else "ready", session=self._session_id))

    def _head(self, head: Head) -> None:
        if head.state == "done":
            if self._done_at_s is None:
                self._done_at_s = time.monotonic()
                self._fetch.stop()
                self._supervisor.drop()
                self._step(Event.DONE)
        elif head.boot != self._boot:
            self._greet()
            self._outbox.announce()

    def _welcome(self, message: Welcome) -> None:
        self._boot = message.boot
        self._hello.answered()

    def _refused(self, message: Refusal) -> None:
        if self._hello.due_s is None:  # we are welcome; it was about some other message
            log.warning("the server could not use a message: %s", message.reason)
            return
        raise Refused(f"the server refuses this device: {message.reason}")

    def _offered(self, offer: Offer) -> None:
        self._hello.answered()
        if self._supervisor.described is None:
            return  # it answers an earlier life; this one has not greeted yet
        newest = self._waiting or self._offer
        if newest is not None and (offer.round, offer.ticket) == (newest.round, newest.ticket):
            if self._phase is not Phase.IDLE:
                self._offered_again(offer)
                return
        elif newest is not None and offer.round < newest.round:
            return
        if self._phase is Phase.SENDING:
            self._waiting = offer
            return
        if offer.round <= self._last_receipt:
            return
        if not self._newest.raise_to(offer.version):
            self._refuse_older(offer)
            return
        self._offer, self._damaged = offer, 0
        self._set_deadline(offer)
        self._fetch_bytes = self._fetch.missing_bytes(offer)
        self._step(Event.OFFERED)

    def _refuse_older(self, offer: Offer) -> None:
        """A server that lost versions, or an offer of long ago: neither undoes what was learned."""
        why = (
            f"the offer's model is version {offer.version}, this device has taken up version "
            f"{self._newest.version}: restore the server's state, or delete {self._newest.path} "
            "on the device to accept an older model"
        )
        log.warning("round %d: %s", offer.round, why)
        self._say(Decline(round=offer.round, reason=why))

    def _offered_again(self, offer: Offer) -> None:
        """The deadline may have been put off, or the broker may take only smaller pieces by now."""
        self._set_deadline(offer)
        if self._fetch.active and self._waiting is None:
            self._offer = offer
            self._fetch_blocks()

    def _receipt(self, receipt: Receipt) -> None:
        if not self._outbox.answered(receipt):
            return
        self._settings.report(
            {"event": "receipt", "round": receipt.round, "verdict": receipt.verdict}
        )
        if receipt.verdict != "accepted":
            log.warning("round %d: update %s: %s", receipt.round, receipt.verdict, receipt.reason)
        self._last_receipt = max(self._last_receipt, receipt.round)
        self._step(Event.RECEIPT)
        self._tally(receipt.round)
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._offered(waiting)
        self._send_leftovers()

    def _piece(self, piece: Piece) -> None:
        if self._fetch.take(piece):
            self._fetched()

    # -- the trainer ------------------------------------------------------------------------

    def _outcome(self, outcome: Outcome | None) -> None:
        if isinstance(outcome, Described):
            self._greet()
            self._send_leftovers()
        elif isinstance(outcome, Fits):
            self._fetch_blocks()
        elif isinstance(outcome, Trained):
            self._step(Event.TRAINED)
        elif isinstance(outcome, Down):
            self._step(Event.KILLED)
        elif isinstance(outcome, GaveUp):
            self._sit_out(outcome.reason)
        elif isinstance(outcome, Damaged):
            self._damaged += 1
            if self._damaged > MAX_DAMAGED:
                self._sit_out(f"blocks arrived damaged {self._damaged} times: {outcome.message}")
            else:
                self._step(Event.DAMAGED)

    def _set_deadline(self, offer: Offer) -> None:
        self._deadline_at_s = time.monotonic() + offer.deadline_s
        self._supervisor.extend(self._deadline_at_s)

    def _sit_out(self, why: str) -> None:
        self._why = why
        self._step(Event.PLAN_FAILED)

    # -- effects ----------------------------------------------------------------------------

    def _take_up(self) -> None:
        """Fetch for an offer, once it is sure that it can be carried out."""
        assert self._offer is not None
        self._fetch.stop()
        self._outcome(self._supervisor.take_up(self._offer, self._fetch_bytes))

    def _fetch_blocks(self) -> None:
        """Fetch the blocks the cache lacks; without one, go on."""
        offer = self._offer
        assert offer is not None
        if self._fetch.begin(offer):
            self._fetched()

    def _fetched(self) -> None:
        assert self._offer is not None
        self._cache.evict({entry.sha256 for entry in self._offer.blocks})
        self._step(Event.FETCHED)

    def _train(self) -> None:
        assert self._offer is not None
        self._presence()
        self._outcome(self._supervisor.train(self._offer, self._deadline_at_s))

    def _send_leftovers(self) -> None:
        """An update of an earlier life, or of a plan given up, still needs its receipt."""
        if self._phase is Phase.IDLE and self._own_entries():
            self._step(Event.SPOOLED)

    def _own_entries(self) -> list[SpoolEntry]:
        entries = [e for e in self._spool.entries() if e.job == self._settings.job]
        for report in self._spool.take_reports():
            log.warning("%s", report)
        return entries

    def _send_update(self) -> None:
        entries = self._own_entries()
        if not entries:
            raise ConfigError(f"the spool {self._settings.state_dir / 'spool'} was emptied by hand")
        self._presence()
        self._outbox.deliver(entries[0])

    def _decline(self) -> None:
        offer = self._offer
        assert offer is not None
        log.warning("round %d: sits out: %s", offer.round, self._why)
        self._settings.report({"event": "decline", "round": offer.round, "reason": self._why})
        self._say(Decline(round=offer.round, reason=self._why[:2000]))

    def _tally(self, round_number: int) -> None:
        """Report what the round cost on the socket and in both processes."""
        up, down = self._link.sent_bytes, self._link.received_bytes
        cpu_s = self._supervisor.cpu_s
        self._say(
            Tally(
                round=round_number,
                up_bytes=up - self._up_mark,
                down_bytes=down - self._down_mark,
                cpu_s=max(0.0, cpu_s - self._cpu_mark_s),
                agent_rss_bytes=process_peak_bytes(os.getpid()),
                trainer_peak_bytes=self._supervisor.peak_bytes,
            )
        )
        self._up_mark, self._down_mark, self._cpu_mark_s = up, down, cpu_s


_HANDLERS: dict[type, Callable[[Agent, Any], None]] = {
    Welcome: Agent._welcome,
    Refusal: Agent._refused,
    Offer: Agent._offered,
    Want: lambda agent, want: agent._outbox.wanted(want),
    Receipt: Agent._receipt,
    Piece: Agent._piece,
}

_EFFECTS: dict[Effect, Callable[[Agent], None]] = {
    Effect.FETCH: Agent._take_up,
    Effect.TRAIN: Agent._train,
    Effect.RETRAIN_LOWER: lambda agent: agent._outcome(agent._supervisor.train_again()),
    Effect.STOP_TRAINER: lambda agent: agent._supervisor.drop(),
    Effect.SEND_UPDATE: Agent._send_update,
    Effect.FORGET_UPDATE: lambda agent: agent._outbox.forget(),
    Effect.DECLINE: Agent._decline,
}

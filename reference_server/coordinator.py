"""The server's main loop: one queue in, the round's decisions out.

What must survive a crash is in the ledger and the version store before it is said. After a kill
the same code starts, finds the open round and continues it: devices greet the new incarnation,
those already counted are told so, the others go on.
"""

from __future__ import annotations

import logging
import queue
import random
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from edge_sdk.brokers import broker_profile
from edge_sdk.errors import MalformedMessage, PeerError, Refused, StateError
from edge_sdk.link import Arrived, LinkDown, LinkUp, TakenOver
from edge_sdk.process import process_cpu_s, process_peak_bytes
from edge_sdk.strategies import strategy_named
from edge_sdk.wire import (
    Decline,
    Hello,
    Offer,
    Open,
    Piece,
    Presence,
    Receipt,
    Refusal,
    Tally,
    Want,
    Welcome,
    decode,
)
from reference_server import fleet as fleets
from reference_server.counting import Counted, Counting, CountingFailed, RoundTerms
from reference_server.downlink import Downlink, Inbox
from reference_server.evaluate import Evaluator
from reference_server.ingest import Ingest
from reference_server.ledger import Answers, Ledger, RoundRow
from reference_server.merging import first_version, merge_round
from reference_server.report import ROW_KEYS, RunReport
from reference_server.rounds import (
    Action,
    Decision,
    Phase,
    RoundPolicy,
    RoundView,
    decide,
    opened_at_s,
)
from reference_server.trust import Tickets
from reference_server.versions import Manifest, VersionStore

MAX_ABANDONED_IN_A_ROW = 3
TALLY_WAIT_S = 5.0
# What a killed server may give a round twice; oftener would only wear the disk.
KEEP_TIME_S = 1.0

log = logging.getLogger("reference_server")
Event = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What ``reference-server run`` was asked to do."""

    url: str
    job: str
    task_path: Path
    state_dir: Path
    strategy: str = "last_blocks"
    codec: str = "balanced"
    rounds: int = 10
    seed: int = 0
    min_devices: int = 1
    round_s: float = 60.0
    policy: RoundPolicy = field(default_factory=RoundPolicy)
    threads: int = 1
    broker: Mapping[str, str] = field(default_factory=dict)
    broker_profile: str = "generic"
    report: Callable[[Event], None] = field(default=lambda event: None)
    look_after: Callable[[], Any] = field(default=lambda: None)


class Coordinator:
    """Runs one job to its end."""

    def __init__(self, settings: ServerSettings, ledger: Ledger) -> None:
        self._settings = settings
        self._started_s = time.monotonic()
        self._strategy = strategy_named(settings.strategy)
        self._inbox = Inbox()
        self._rng = random.Random()
        self._boot = secrets.token_hex(8)
        self._ledger = ledger
        self._versions = VersionStore(settings.state_dir)
        self._versions.sweep()
        self._evaluator = Evaluator(settings.task_path, settings.seed, settings.threads)
        self._training = msgspec.structs.replace(self._evaluator.task.training, seed=settings.seed)
        self._settle_terms()
        tickets = Tickets.load_or_create(settings.state_dir)
        spec = self._evaluator.spec
        self._tickets = tickets
        self._fleet = fleets.Fleet(spec.digest())
        self._counting = Counting(settings.job, spec, self._strategy, ledger, self._inbox.put_later)
        self._ingest = Ingest(
            settings.job,
            spec,
            ledger,
            tickets,
            settings.state_dir / "incoming",
            self._counting,
            self._rng,
        )
        self._row: RoundRow | None = None
        self._known_answers: Answers | None = None
        self._opened_at_s = self._last_answer_s = self._time_kept_s = 0.0
        self._idle_since_s = self._started_s
        self._why = ""
        self._abandoned = 0
        self._dropped = 0
        self._waiting = False
        self._manifest: Manifest
        name = self._evaluator.task.name
        facts = {"strategy": settings.strategy, "task": name, "seed": settings.seed}
        facts |= {"broker": settings.broker} if settings.broker else {}
        self._report = RunReport(settings.state_dir / "report.json", facts, spec)
        self._down = Downlink(
            settings.url,
            settings.job,
            self._inbox,
            self._versions,
            settings.state_dir,
            broker_profile(settings.broker_profile),
            self._rng,
            self._boot,
        )

    def finished_before(self) -> dict[str, Any] | None:
        """The report of a job that an earlier start has finished; None: there is work to do."""
        latest = self._ledger.latest_version(self._settings.job)
        if latest is None or latest.version < self._settings.rounds:
            return None
        return self._report.complete(latest.sha)

    def run(self) -> dict[str, Any]:
        """Run the job to its last round; returns the report."""
        self._down.start()
        try:
            self._manifest = first_version(
                self._settings.job, self._evaluator, self._ledger, self._versions, self._say
            )
            self._down.place(self._manifest)
            self._resume()
            while not self._finished():
                self._handle(self._next())
                self._hear_out()
                self._look_at_round()
                self._keep_time()
                self._repeat()
            return self._finish()
        finally:
            self.close()

    def close(self) -> None:
        """Leave the broker; may be called twice."""
        self._counting.close()
        self._down.close()

    # -- start ------------------------------------------------------------------------------

    def _settle_terms(self) -> None:
        """The terms a job was started with stand; StateError when it is continued on others."""
        mine = self._settings
        asked = {
            "strategy": mine.strategy,
            "codec": mine.codec,
            "seed": mine.seed,
            "training": msgspec.to_builtins(self._training),
        }
        stored = self._ledger.open_job(mine.job, self._evaluator.spec.digest(), asked)
        for key, value in asked.items():
            if stored.get(key) != value:
                raise StateError(
                    f"{mine.state_dir}: job {mine.job!r} was started with {key} "
                    f"{stored.get(key)!r}, now {value!r} is asked for: continue with the old "
                    "value, or start a new job in another state directory"
                )

    def _resume(self) -> None:
        """Continue the round that a killed incarnation left open or half closed."""
        row = self._ledger.current_round(self._settings.job)
        if row is None or row.phase not in (Phase.PLANNED, Phase.OPEN, Phase.CLOSING):
            return
        self._row = row
        if row.phase is Phase.CLOSING:
            self._merge()
        elif row.phase is Phase.OPEN:
            now_s = time.monotonic()
            self._opened_at_s = opened_at_s(
                self._settings.policy, row.extensions, row.remaining_s, now_s
            )
            self._last_answer_s = now_s
            self._set_terms(row)
            self._say({"event": "resumed", "round": row.round})

    # -- the loop ---------------------------------------------------------------------------

    def _say(self, event: Event) -> None:
        self._settings.report(event)

    def _next(self) -> Any:
        now_s = time.monotonic()
        deciding = self._row is not None and self._row.phase is Phase.OPEN
        due = [self._decision().until_s if deciding else now_s + 1.0]
        asked_s = self._ingest.next_due_s()
        pause_s = self._down.due_in_s()
        due += [] if asked_s is None else [asked_s]
        due += [] if pause_s is None else [now_s + pause_s]
        try:
            return self._inbox.get(timeout=max(0.0, min(due) - now_s))
        except queue.Empty:
            return None

    def _handle(self, event: Any) -> None:
        if isinstance(event, Arrived):
            try:
                self._arrived(event)
            except PeerError as error:
                self._dropped += 1
                log.warning("dropped a message on %s: %s", event.topic, error)
            self._down.tend()  # who is served must not wait for all who come after
        elif isinstance(event, Counted):
            now_s = time.monotonic()
            self._answer(event.arrival.device, self._ingest.counted(event, now_s), now_s)
        elif isinstance(event, CountingFailed):
            raise event.error
        elif isinstance(event, LinkUp):
            self._connected()
            self._say({"event": "link", "protocol": event.protocol})
        elif isinstance(event, LinkDown):
            log.warning("link to the broker is down: %s", event.reason)
            self._down.lost()
            self._settings.look_after()
        elif isinstance(event, TakenOver):
            raise StateError(
                f"another server of job {self._settings.job!r} is connected to this broker; a job "
                "has one server: stop the other one, or use another --job"
            )

    def _connected(self) -> None:
        self._down.reconnected()
        if self._ingest.terms is not None:
            self._ingest.terms = replace(
                self._ingest.terms, piece_bytes=self._down.update_piece_bytes
            )

    def _arrived(self, event: Arrived) -> None:
        if self._down.heard_itself(event):
            return
        device = self._down.topics.device_of(event.topic)
        now_s = time.monotonic()
        if event.topic == self._down.topics.presence(device):
            self._presence(device, event.payload, now_s)
            return
        try:
            message = decode(event.payload)
        except MalformedMessage as error:
            self._down.say(device, Refusal(reason=str(error)))
            raise
        self._fleet.heard(device, now_s)
        handler = _HANDLERS.get(type(message))
        if handler is None:
            raise MalformedMessage(f"a device does not send {type(message).__name__}")
        handler(self, device, message, now_s)

    def _presence(self, device: str, payload: bytes, now_s: float) -> None:
        if not payload:
            return
        message = decode(payload)
        if not isinstance(message, Presence):
            raise MalformedMessage(f"{type(message).__name__} on a presence topic")
        state = fleets.Presence(message.state)
        if self._fleet.presence(device, state, message.session, now_s):
            self._say({"event": "presence", "device": device, "state": message.state})

    def _repeat(self) -> None:
        for device, want in self._ingest.due(time.monotonic()):
            self._down.say(device, want)
        self._down.tend()

    # -- what devices say -------------------------------------------------------------------

    def _hello(self, device: str, message: Hello, now_s: float) -> None:
        try:
            self._fleet.hello(device, message, now_s)
        except Refused as error:
            self._down.say(device, Refusal(reason=str(error)))
            raise
        self._down.say(device, Welcome(boot=self._boot, session=message.session))
        self._say({"event": "device", "device": device, "profile": message.profile})
        if self._row is not None and self._row.phase is Phase.OPEN:
            answers = self._answers(self._row)
            if device not in answers.verdicts:
                self._offer([device])

    def _want(self, device: str, want: Want, _now_s: float) -> None:
        if not self._down.serve(device, want):
            self._offer([device])  # the broker takes less than when it was offered

    def _open(self, device: str, message: Open, now_s: float) -> None:
        answer = self._ingest.open(device, message, now_s)
        if not isinstance(answer, Receipt):
            self._report.opened(message.round, device)
        self._answer(device, answer, now_s)

    def _piece(self, device: str, piece: Piece, now_s: float) -> None:
        self._answer(device, self._ingest.piece(device, piece, now_s), now_s)

    def _answer(self, device: str, answer: Receipt | Want | None, now_s: float) -> None:
        if answer is None:
            return
        self._down.say(device, answer)
        if isinstance(answer, Receipt):
            self._last_answer_s = now_s
            self._report.answered(answer.round, device)
            if self._row is not None and self._row.round == answer.round:
                self._answers(self._row).verdicts[device] = answer.verdict
            event = {"event": "update", "device": device, "round": answer.round}
            self._say({**event, "verdict": answer.verdict, "reason": answer.reason})

    def _keep_time(self) -> None:
        """Note now and then how much time the open round has left, for the case of a restart."""
        row, now_s = self._row, time.monotonic()
        if row is not None and row.phase is Phase.OPEN and now_s >= self._time_kept_s + KEEP_TIME_S:
            self._time_kept_s = now_s
            left_s = self._opened_at_s + self._settings.policy.given_s(row.extensions) - now_s
            self._ledger.keep_time(self._settings.job, row.round, left_s)

    def _declined(self, device: str, message: Decline, now_s: float) -> None:
        if self._row is None or message.round != self._row.round:
            return
        job = self._settings.job
        if self._ledger.record_decline(job, message.round, device, message.reason):
            self._last_answer_s = now_s
            self._answers(self._row).declined[device] = message.reason
            self._say({"event": "decline", "device": device, "reason": message.reason})

    def _tallied(self, device: str, message: Tally, _now_s: float) -> None:
        if self._ledger.verdict_of(self._settings.job, message.round, device) is not None:
            self._report.tally(device, message)

    # -- rounds -----------------------------------------------------------------------------

    def _finished(self) -> bool:
        if self._abandoned >= MAX_ABANDONED_IN_A_ROW:
            raise Refused(
                f"{self._abandoned} rounds in a row ended without a version: fewer than "
                f"{self._settings.policy.min_devices} updates were accepted in each. "
                f"{self._why[:1500] or 'No device said why: see their own output'}"
            )
        return self._row is None and self._manifest.version >= self._settings.rounds

    def _look_at_round(self) -> None:
        if self._row is None or self._row.phase is Phase.PLANNED:
            self._open_round()
            return
        decision = self._decision()
        if decision.action is Action.CLOSE:
            self._row = self._ledger.close_round(self._settings.job, self._row.round)
            self._merge()
        elif decision.action is Action.EXTEND:
            self._row = self._ledger.extend_round(
                self._settings.job, self._row.round, self._settings.policy.extend_s
            )
            self._say({"event": "extended", "round": self._row.round, "reason": decision.reason})
        elif decision.action is Action.ABANDON:
            self._abandon(decision.reason)

    def _answers(self, row: RoundRow) -> Answers:
        """What the ledger says of the open round, read once and kept up from then on."""
        if self._known_answers is None:
            self._known_answers = self._ledger.answers(self._settings.job, row.round)
        return self._known_answers

    def _decision(self) -> Decision:
        row = self._row
        assert row is not None
        answers = self._answers(row)
        view = RoundView(
            offered=answers.offered,
            opened_at_s=self._opened_at_s,
            verdicts=answers.verdicts,
            declined=answers.declined.keys(),
            lost=self._fleet.lost(),
            last_answer_s=self._last_answer_s,
            extensions=row.extensions,
        )
        return decide(view, self._settings.policy, time.monotonic())

    def _open_round(self) -> None:
        """Open the next round once enough devices are here."""
        now_s = time.monotonic()
        job, manifest = self._settings.job, self._manifest
        if manifest.version >= self._settings.rounds or not self._down.ready:
            return
        number = self._row.round if self._row is not None else -1
        ready = self._fleet.eligible(number, now_s)
        if len(ready) < self._devices_needed(now_s):
            if not self._waiting:
                self._waiting = True
                self._say({"event": "waiting", "needed": self._devices_needed(now_s)})
            return
        self._waiting = False
        if self._row is None:
            self._row = self._ledger.plan_round(
                job, base_version=manifest.version, base_sha=manifest.model_sha256
            )
        self._row = self._ledger.open_round(job, self._row.round, self._settings.policy.deadline_s)
        self._opened_at_s = self._last_answer_s = now_s
        self._set_terms(self._row)
        self._say({"event": "round", "round": self._row.round, "devices": ready})
        self._offer(ready)

    def _devices_needed(self, now_s: float) -> int:
        """The whole fleet for the first round; later its absentees delay a round once at most."""
        policy, whole = self._settings.policy, self._settings.min_devices
        started = self._manifest.version > 0 or self._abandoned > 0
        waited = now_s - self._idle_since_s > policy.deadline_s
        return policy.min_devices if started and waited else max(whole, policy.min_devices)

    def _set_terms(self, row: RoundRow) -> None:
        self._known_answers = None
        self._ingest.judged = self._answers(row).verdicts
        self._ingest.terms = RoundTerms(
            round=row.round,
            base_sha=row.base_sha,
            codec=self._settings.codec,
            open_blocks=self._evaluator.spec.names,
            piece_bytes=self._down.update_piece_bytes,
        )

    def _offer(self, devices: list[str]) -> None:
        row, terms = self._row, self._ingest.terms
        assert row is not None
        assert terms is not None
        offered = self._answers(row).offered
        new = [device for device in devices if device not in offered]
        self._ledger.record_offers(self._settings.job, row.round, new)
        offered.update(new)
        for device in devices:
            self._fleet.offered(device, row.round)
            self._down.offer(
                device,
                len(offered),
                Offer(
                    round=row.round,
                    ticket=self._tickets.issue(self._settings.job, row.round, device, row.base_sha),
                    version=self._manifest.version,
                    base_sha=row.base_sha,
                    blocks=self._manifest.blocks,
                    slots=self._down.slots(),
                    strategy=self._settings.strategy,
                    open_blocks=terms.open_blocks,
                    codec=terms.codec,
                    deadline_s=self._settings.round_s,
                    training=self._training,
                    piece_bytes=self._down.piece_bytes,
                ),
            )

    def _abandon(self, reason: str) -> None:
        row = self._row
        assert row is not None
        self._ledger.abandon(self._settings.job, row.round)
        self._say({"event": "abandoned", "round": row.round, "reason": reason})
        declined = self._answers(row).declined
        self._why = "; ".join(f"{device}: {why}" for device, why in sorted(declined.items()))
        self._row, self._ingest.terms = None, None
        self._ingest.forget()
        self._abandoned += 1
        self._idle_since_s = time.monotonic()

    def _merge(self) -> None:
        """CLOSING to PUBLISHED: the same bytes however often a killed server repeats it."""
        row = self._row
        assert row is not None
        self._ingest.terms = None
        self._ingest.forget()
        job, base = self._settings.job, self._manifest
        half, codec = self._strategy.server_round, self._settings.codec
        manifest, coverage = merge_round(
            row, base, half, codec, self._evaluator.spec, self._ledger, self._versions
        )
        self._ledger.publish(
            job, row.round, version=manifest.version, sha=manifest.model_sha256, parent=row.base_sha
        )
        self._manifest, self._row, self._abandoned = manifest, None, 0
        self._idle_since_s = time.monotonic()
        wall_s = self._idle_since_s - self._opened_at_s
        self._down.place(manifest)
        self._look_at_round()
        self._conclude(row.round, coverage, wall_s)
        self._ledger.archive(job)

    def _hear_out(self) -> None:
        """Handle all that has arrived: what waits in the queue must not look overdue."""
        while not self._inbox.empty():
            self._handle(self._inbox.get())

    def _conclude(self, number: int, coverage: Mapping[str, Any], wall_s: float) -> None:
        """Measure the new version and enter the round into the report."""
        measured = self._evaluator.measure(self._versions, self._manifest)
        self._hear_out()  # the last device's tally comes after its receipt
        rows = [self._row_of(upload) for upload in self._ledger.uploads(self._settings.job, number)]
        entry = self._report.closed(
            number,
            measured=measured,
            wall_s=wall_s,
            coverage=coverage,
            devices=rows,
            declined=self._ledger.answers(self._settings.job, number).declined,
        )
        self._report.save()
        self._say({"event": "published", "version": self._manifest.version, **entry})

    def _row_of(self, upload: Any) -> dict[str, Any]:
        device = self._fleet.get(upload.device)
        return {
            "id": upload.device,
            "profile": device.facts.profile if device is not None else "",
            "blocks": upload.metrics.get("blocks", []),
            **{key: upload.metrics.get(key) for key in ROW_KEYS},
            "up_payload_bytes": upload.size_bytes,
            "num_examples": upload.samples,
            "verdict": upload.verdict,
        }

    # -- end --------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        """Wait for the last tallies, export, tell the devices, complete the report."""
        until_s = time.monotonic() + TALLY_WAIT_S
        # A server that was killed here, and started again, has yet to reach its broker.
        while time.monotonic() < until_s and (
            self._report.missing_tallies() or not self._down.connected
        ):
            try:
                self._handle(self._inbox.get(timeout=max(0.0, until_s - time.monotonic())))
            except queue.Empty:
                break
        self._down.finish()
        files = self._export()
        checks = self._ledger.audit(self._settings.job)
        peak = process_peak_bytes()
        totals = {
            "updates_double": sum(not check.ok for check in checks),
            "peak_rss_server_bytes": peak,
            "cpu_s_server": process_cpu_s(),
            "messages_dropped": self._dropped,
        }
        report = self._report.finish(
            model_sha256=self._manifest.model_sha256,
            files=files,
            totals=totals,
            wall_s=time.monotonic() - self._started_s,
        )
        self._report.save()
        self._say({"event": "done", "report": report})
        return report

    def _export(self) -> dict[str, str]:
        # Only here, because ONNX Runtime is not needed before.
        from reference_server.export import export_all

        files, fault = export_all(
            self._evaluator, self._versions, self._manifest, self._settings.state_dir
        )
        if fault:  # the model is safe; this must not cost the run its report
            self._say({"event": "not_exported", "reason": fault})
        return files


_HANDLERS: dict[type, Callable[[Coordinator, str, Any, float], None]] = {
    Hello: Coordinator._hello,
    Want: Coordinator._want,
    Open: Coordinator._open,
    Piece: Coordinator._piece,
    Decline: Coordinator._declined,
    Tally: Coordinator._tallied,
}

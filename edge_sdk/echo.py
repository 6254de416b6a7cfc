"""How fast this device's link to the broker is, by what the broker takes and gives back.

One message of our own is published again and again, retained: what the broker acknowledges per
second is the rate up. Then we subscribe to it by several filters at once; for each the broker
sends the retained message again, with nothing going up beside it: the rate down. The message is
cleared at the end, by the last will if we are killed.
"""

from __future__ import annotations

import queue
import secrets
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from edge_sdk.link import Arrived, LinkDown, LinkEvent, LinkUp, TakenOver
from edge_sdk.measure import Rate
from edge_sdk.mqtt import Link
from edge_sdk.wire import Topics

FIRST_BYTES, MESSAGE_BYTES, MESSAGES = 8 * 1024, 32 * 1024, 8
# The part of the time that going up may take, so that coming down has its own.
_UP_SHARE = 0.4
_CLOSE_S = 0.3


@dataclass(frozen=True, slots=True)
class LinkRates:
    """Payload bytes per second each way, ``None`` where nothing came through, and why."""

    up: Rate | None
    down: Rate | None
    reason: str


def measure_link(url: str, budget_s: float, *, ca_file: str | None = None) -> LinkRates:
    """Both directions within ``budget_s``; ConfigError for an address that names no broker.

    The topic is below a job of our own, where neither devices nor servers listen.
    """
    end_s = time.monotonic() + budget_s
    name = f"rate-{secrets.token_hex(6)}"
    topic = Topics(name).presence(name)
    inbox: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
    link = Link(url, name, inbox, ca_file=ca_file, will=(topic, b""))
    link.start()
    try:
        reason = _wait_until_up(inbox, end_s)
        if reason:
            return LinkRates(None, None, reason)
        up = _send(link, topic, end_s)
        if up is None:
            return LinkRates(None, None, _within(budget_s, "acknowledged nothing"))
        down = _receive(link, inbox, topic, end_s)
        _clear(link, inbox, topic, end_s)
        what = "gave nothing back: an access rule may forbid it"
        return LinkRates(up, down, "" if down else _within(budget_s, what))
    finally:
        # What a slow link has not sent yet must not hold up the caller.
        closing = threading.Thread(target=link.close, daemon=True)
        closing.start()
        closing.join(_CLOSE_S)


def _within(budget_s: float, what: str) -> str:
    return f"the broker {what} within {budget_s:.1f} s"


def _wait_until_up(inbox: queue.SimpleQueue[LinkEvent], end_s: float) -> str:
    """Why there is no connection, or nothing."""
    for event in _events(inbox, end_s):
        match event:
            case LinkUp():
                return ""
            case LinkDown(reason=reason) | TakenOver(reason=reason):
                return reason
    return "no connection to the broker in time"


def _send(link: Link, topic: str, end_s: float) -> Rate | None:
    """Publish one small message, then as many large ones as fit into our part of the time."""
    start_s = time.perf_counter()
    link.publish(topic, secrets.token_bytes(FIRST_BYTES), retain=True)
    if not link.wait_below(0, max(0.0, end_s - time.monotonic())) or not link.connected:
        return None
    took_s = max(1e-6, time.perf_counter() - start_s)
    allowed_s = _UP_SHARE * max(0.0, end_s - time.monotonic())
    count = min(MESSAGES, int(allowed_s * FIRST_BYTES / took_s / MESSAGE_BYTES))
    if count == 0:
        return Rate(FIRST_BYTES / took_s, 0.0, 1)
    payload = secrets.token_bytes(MESSAGE_BYTES)  # a compressing tunnel must not flatter the link
    marks_s = [time.perf_counter()]
    for _ in range(count):
        link.publish(topic, payload, retain=True)
    for left in reversed(range(count)):
        if not link.wait_below(left * MESSAGE_BYTES, max(0.0, end_s - time.monotonic())):
            break
        marks_s.append(time.perf_counter())
    if not link.connected or len(marks_s) == 1:
        return None
    return _rate(MESSAGE_BYTES, marks_s)


def _receive(
    link: Link, inbox: queue.SimpleQueue[LinkEvent], topic: str, end_s: float
) -> Rate | None:
    """Subscribe by every filter at once, and take the time of what arrives."""
    marks_s = [time.perf_counter()]
    filters = _filters(topic)
    for topic_filter in filters:
        link.subscribe(topic_filter)
    size_bytes = 0
    for event in _events(inbox, end_s):
        if isinstance(event, Arrived) and event.topic == topic and event.payload:
            size_bytes = len(event.payload)
            marks_s.append(time.perf_counter())
            if len(marks_s) > len(filters):
                break
        elif isinstance(event, (LinkDown, TakenOver)):
            break
    if len(marks_s) > 2:
        del marks_s[0]  # the first one's time is mostly that of asking
    return _rate(size_bytes, marks_s) if size_bytes else None


def _clear(link: Link, inbox: queue.SimpleQueue[LinkEvent], topic: str, end_s: float) -> None:
    """Take the retained message back, and wait until the broker says so to all who listen."""
    link.publish(topic, b"", retain=True)
    for event in _events(inbox, end_s):
        if isinstance(event, (LinkDown, TakenOver)) or event == Arrived(topic, b""):
            return


def _filters(topic: str) -> list[str]:
    """Different filters that match the topic, each as narrow as our random name."""
    root, version, job, kind, name = topic.split("/")
    return [
        topic,
        f"{root}/{version}/{job}/{kind}/+",
        f"{root}/{version}/{job}/+/{name}",
        f"{root}/{version}/{job}/+/+",
        f"{root}/{version}/{job}/#",
        f"{root}/{version}/+/{kind}/{name}",
        f"{root}/{version}/+/+/{name}",
        f"{root}/+/{job}/{kind}/{name}",
    ]


def _rate(size_bytes: int, marks_s: list[float]) -> Rate:
    """Bytes over the whole time; the spread is that of the times between messages."""
    steps_s = [max(1e-7, b - a) for a, b in pairwise(marks_s)]
    spread = 0.0
    if len(steps_s) > 1:
        low, middle, high = statistics.quantiles(steps_s, n=4, method="inclusive")
        spread = (high - low) / middle
    return Rate(size_bytes * len(steps_s) / sum(steps_s), spread, len(steps_s))


def _events(inbox: queue.SimpleQueue[LinkEvent], end_s: float) -> Iterator[LinkEvent]:
    """What arrives until the time is over."""
    while (left_s := end_s - time.monotonic()) > 0:
        try:
            yield inbox.get(timeout=left_s)
        except queue.Empty:
            return

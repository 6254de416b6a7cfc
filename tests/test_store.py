"""Files survive what kills processes and fills disks; what is damaged is never handed out."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk.errors import DamagedBlock, ProtocolMisuse, StateError
from edge_sdk.store import (
    MAX_DAMAGED_FILES,
    BlockCache,
    DirectoryLock,
    Identity,
    Newest,
    Spool,
    check_sha256,
    make_directory,
    read_piece,
    sweep_temporary,
    write_atomically,
)

ROOT = Path(__file__).parents[1]
TICKET = bytes(range(16))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def child(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_writing_replaces_the_whole_file_and_keeps_it_private(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"first, and long")
    write_atomically(path, memoryview(b"second"))
    assert path.read_bytes() == b"second"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["file"]


def test_a_killed_writer_leaves_the_old_or_the_new_content(tmp_path: Path) -> None:
    script = """
import sys; from pathlib import Path; from edge_sdk.store import write_atomically
number = 0
while True:
    write_atomically(Path(sys.argv[1]), bytes([number % 251]) * 100_000)
    print(number, flush=True); number += 1
"""
    path = tmp_path / "file"
    for passes in (1, 4, 9):
        writer = child(script, path)
        assert writer.stdout is not None
        for _ in range(passes):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        content = path.read_bytes()
        assert (len(content), len(set(content))) == (100_000, 1)
    sweep_temporary(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_keeps_the_old_content_and_says_what_to_do(small_disk: Path) -> None:
    path = small_disk / "file"
    write_atomically(path, b"old")
    with pytest.raises(StateError) as caught:
        write_atomically(path, bytes(200_000))
    assert str(caught.value) == (
        f"cannot write {path}: No space left on device; "
        "free some space there, or choose a state directory on another disk"
    )
    assert path.read_bytes() == b"old"
    assert os.listdir(small_disk) == ["file"]


def test_a_read_only_disk_is_named(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StateError, match=r"Read-only file system; make it writable"):
        write_atomically(small_disk / "file", b"")
    with pytest.raises(StateError, match=r"cannot create .*state: Read-only file system"):
        make_directory(small_disk / "state")
    with pytest.raises(StateError, match=r"cannot lock .*lock: Read-only file system"):
        DirectoryLock(small_disk)


def test_a_file_size_limit_reads_like_a_full_disk(tmp_path: Path) -> None:
    script = """
import resource, sys; from pathlib import Path; from edge_sdk.store import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try: write_atomically(Path(sys.argv[1]), bytes(5000))
except Exception as error: print(type(error).__name__, error)
"""
    output, _ = child(script, tmp_path / "file").communicate()
    assert output.startswith("StateError cannot write")
    assert "File too large; free some space" in output
    assert os.listdir(tmp_path) == []


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"cannot write .*gone/file: No such file or directory"):
        write_atomically(tmp_path / "gone" / "file", b"")
    with pytest.raises(StateError, match="cannot read"):
        read_piece(tmp_path / "gone", 0, 1)


def test_pieces_end_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    assert read_piece(tmp_path / "file", 8, 5) == b"89"
    assert read_piece(tmp_path / "file", 10, 5) == b""
    with pytest.raises(ProtocolMisuse, match="piece at -1 of 5 bytes"):
        read_piece(tmp_path / "file", -1, 5)


def test_a_directory_has_one_user_at_a_time(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    with pytest.raises(StateError, match=f"is in use by process {os.getpid()}: stop that process"):
        DirectoryLock(tmp_path)
    lock.release()
    lock.release()
    DirectoryLock(tmp_path).release()


def test_a_killed_process_frees_its_directory(tmp_path: Path) -> None:
    script = """
import sys; from pathlib import Path; from edge_sdk.store import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1])); print("held", flush=True); sys.stdin.read()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(StateError, match=f"in use by process {holder.pid}"):
        DirectoryLock(tmp_path)
    holder.kill()
    holder.communicate()
    DirectoryLock(tmp_path).release()


def test_an_identity_is_made_once_and_kept(tmp_path: Path) -> None:
    made = Identity.load_or_create(tmp_path / "s", stem="My Pi.local", rng=random.Random(1))
    again = Identity.load_or_create(tmp_path / "s", stem="other", rng=random.Random(2))
    assert made == again
    assert made.device.startswith("my-pi-local-")
    assert (tmp_path / "s" / "device-id").stat().st_mode & 0o777 == 0o600
    other = Identity.load_or_create(tmp_path / "t", stem="My Pi.local", rng=random.Random(2))
    assert other != made
    assert (
        len(Identity.load_or_create(tmp_path / "u", stem="x" * 99, rng=random.Random()).device) < 64
    )


def test_a_chosen_identity_is_kept_and_not_changed(tmp_path: Path) -> None:
    rng = random.Random(1)
    chosen = Identity.load_or_create(tmp_path, stem="x", rng=rng, device="cam-7")
    assert chosen == Identity("cam-7") == Identity.load_or_create(tmp_path, stem="x", rng=rng)
    with pytest.raises(StateError, match="belongs to device 'cam-7', not to 'cam-8'"):
        Identity.load_or_create(tmp_path, stem="x", rng=rng, device="cam-8")


@pytest.mark.parametrize("bad", ["", "Cam 7", "a/../b", "x" * 65])
def test_an_identity_outside_the_pattern_is_refused(tmp_path: Path, bad: str) -> None:
    rng = random.Random(1)
    with pytest.raises(StateError, match="must be 1 to 64 of the characters a-z, 0-9 and '-'"):
        Identity.load_or_create(tmp_path, stem="x", rng=rng, device=bad)
    assert not (tmp_path / "device-id").exists()
    (tmp_path / "device-id").write_text(bad + "\n")
    with pytest.raises(StateError, match=r"the device id in .*device-id is"):
        Identity.load_or_create(tmp_path, stem="x", rng=rng)


def test_the_cache_holds_drops_and_evicts_blocks(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "cache")
    names = [sha256(bytes([n])) for n in range(4)]
    for age, name in enumerate(names):
        path = cache.put(name, bytes(100))
        os.utime(path, ns=(age, age))
    assert cache.has(names[0])
    assert cache.read(names[0]) == bytes(100)
    assert cache.path(names[0]).name == f"{names[0]}.block"
    assert cache.evict({names[0]}, limit_bytes=250) == 200
    assert [cache.has(name) for name in names] == [True, False, False, True]
    assert cache.evict({names[0]}) == 100
    cache.drop(names[0])
    cache.drop(names[0])
    with pytest.raises(DamagedBlock, match="the block is missing; it has to be fetched again"):
        cache.read(names[0])


def test_the_cache_sweeps_interrupted_writes_only_when_told(tmp_path: Path) -> None:
    (tmp_path / ".tmp-1-0-x").write_bytes(b"")
    cache = BlockCache(tmp_path)
    assert os.listdir(tmp_path) == [".tmp-1-0-x"]
    assert cache.sweep() == 1


@pytest.mark.parametrize("bad", ["", "../" * 10, "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_only_a_hash_becomes_a_file_name(tmp_path: Path, bad: str) -> None:
    with pytest.raises(ProtocolMisuse, match="is not a SHA-256 in lower-case hex"):
        BlockCache(tmp_path).path(bad)
    with pytest.raises(ProtocolMisuse):
        check_sha256(bad)


def test_the_spool_keeps_an_update_until_it_is_removed(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    late = spool.put("job", 2, TICKET, b"late update", 20.0)
    early = spool.put("job", 1, TICKET, b"early update", 10.0)
    other = Spool(tmp_path / "spool")
    assert other.entries() == [early, late]
    assert early.ticket == TICKET.hex()
    assert early.sha256 == sha256(b"early update")
    assert other.read_piece(early, 6, 100) == b"update"
    other.remove(early)
    other.remove(early)
    assert spool.entries() == [late]
    assert spool.sweep() == 0
    spool.remove(late)
    assert os.listdir(tmp_path / "spool") == []
    assert spool.take_reports() == []


def test_the_same_bytes_in_two_rounds_are_two_entries(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    first = spool.put("job", 1, TICKET, b"same", 1.0)
    second = spool.put("job", 2, TICKET, b"same", 2.0)
    spool.remove(first)
    assert spool.entries() == [second]


def test_a_second_put_replaces_the_entry_and_removing_the_first_spares_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    first = spool.put("job", 1, TICKET, b"first", 1.0)
    second = spool.put("job", 1, TICKET, b"second", 2.0)
    assert spool.entries() == [second]
    spool.remove(first)
    assert spool.entries() == [second]
    assert spool.take_reports() == []


def test_an_impossible_entry_is_our_own_bug(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    with pytest.raises(ProtocolMisuse, match="spool entry of round 1"):
        spool.put("../job", 1, TICKET, b"x", 1.0)
    with pytest.raises(ProtocolMisuse, match="size_bytes"):
        spool.put("job", 1, TICKET, b"", 1.0)
    assert os.listdir(tmp_path) == []


def test_a_body_without_a_header_is_no_entry_and_swept_at_start(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    kept = spool.put("job", 1, TICKET, b"kept", 1.0)
    (tmp_path / "job.2.aaaaaaaaaaaaaaaa.body").write_bytes(b"killed before the header")
    (tmp_path / ".tmp-1-0-x").write_bytes(b"killed earlier")
    assert spool.entries() == [kept]
    assert spool.sweep() == 2
    assert spool.entries() == [kept]
    assert spool.take_reports() == []


@pytest.mark.parametrize("harm", ["flip", "truncate", "no body", "header", "renamed"])
def test_a_damaged_entry_is_set_aside_and_reported(tmp_path: Path, harm: str) -> None:
    spool = Spool(tmp_path)
    intact = spool.put("job", 1, TICKET, b"intact", 1.0)
    spool.put("job", 2, TICKET, b"victim", 2.0)
    header = tmp_path / "job.2.json"
    body = next(tmp_path.glob("job.2.*.body"))
    if harm == "flip":
        body.write_bytes(b"wictim")
    elif harm == "truncate":
        body.write_bytes(b"vict")
    elif harm == "no body":
        body.unlink()
    elif harm == "header":
        header.write_bytes(b"\xff" + header.read_bytes()[1:])
    else:
        header.rename(tmp_path / "job.3.json")
    assert spool.entries() == [intact]
    reports = spool.take_reports()
    assert reports
    assert "is not sent" in reports[0]
    assert list((tmp_path / "damaged").glob("*.json"))
    assert spool.entries() == [intact]
    assert spool.take_reports() == []


def test_foreign_files_are_set_aside_and_their_number_is_bounded(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for number in range(MAX_DAMAGED_FILES + 3):
        (tmp_path / f"holiday-{number}.jpg").write_bytes(b"")
    assert spool.entries() == []
    assert len(spool.take_reports()) == MAX_DAMAGED_FILES + 3
    assert len(os.listdir(tmp_path / "damaged")) == MAX_DAMAGED_FILES


def test_a_full_disk_spools_nothing_and_loses_nothing(small_disk: Path) -> None:
    spool = Spool(small_disk / "spool")
    kept = spool.put("job", 1, TICKET, b"kept", 1.0)
    with pytest.raises(StateError, match="No space left on device"):
        spool.put("job", 2, TICKET, bytes(100_000), 2.0)
    assert spool.entries() == [kept]
    spool.remove(kept)
    assert spool.put("job", 2, TICKET, bytes(10_000), 2.0) in spool.entries()


def test_importing_the_store_loads_no_numpy() -> None:
    script = "import sys, edge_sdk.store; print('numpy' in sys.modules)"
    output, _ = child(script).communicate()
    assert output == "False\n"


def test_a_device_never_goes_back_to_an_older_version(tmp_path: Path) -> None:
    newest = Newest(tmp_path, "job")
    assert newest.version == -1
    assert newest.raise_to(0)
    assert newest.raise_to(7)
    assert newest.raise_to(7)
    assert not newest.raise_to(6)
    again = Newest(tmp_path, "job")
    assert again.version == 7
    assert not again.raise_to(3)
    assert Newest(tmp_path, "other").raise_to(0), "each job has its own"


@pytest.mark.parametrize("text", [b"", b"-1", b"seven", b"\xff\xfe"])
def test_a_spoilt_mark_of_the_newest_version_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "newest-version.job").write_bytes(text)
    with pytest.raises(StateError, match=r"newest-version\.job holds .* not a version"):
        Newest(tmp_path, "job")

"""Which database the ledger lives in: tables, engines, transactions, errors.

SQLite keeps every acknowledged commit over a power cut only with ``synchronous=FULL``, and lets
two connections that both mean to write start as readers only to fail; so both are set explicitly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Connection, Engine, make_url

from edge_sdk.errors import ProtocolMisuse, StateError
from edge_sdk.store import DirectoryLock, disk_errors, make_directory

SCHEMA_VERSION = 1
LEDGER_FILE = "ledger.sqlite"
BUSY_TIMEOUT_S = 30.0
COMMIT_ATTEMPTS = 3
_SCHEMA_LOCK = 0x65646765  # any number, the same in every server

T = TypeVar("T")

METADATA = sa.MetaData()


def _round_key() -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["job", "round"], ["round.job", "round.id"])


schema_table = sa.Table(
    "ledger_schema", METADATA, sa.Column("version", sa.Integer, primary_key=True)
)
job_table = sa.Table(
    "job",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("settings", sa.Text, nullable=False),
    sa.Column("created_s", sa.Float, nullable=False),
)
round_table = sa.Table(
    "round",
    METADATA,
    sa.Column("job", sa.Text, sa.ForeignKey("job.id"), primary_key=True),
    sa.Column("id", sa.Integer, autoincrement=False, primary_key=True),
    sa.Column("base_version", sa.Integer, nullable=False),
    sa.Column("base_sha", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("settings", sa.Text, nullable=False),
    sa.Column("opened_wall_s", sa.Float),
    sa.Column("remaining_s", sa.Float, nullable=False),
    sa.Column("extensions", sa.Integer, nullable=False, default=0),
    # How many updates were counted when counting ended: what later audits compare with.
    sa.Column("counted", sa.Integer),
)
offer_table = sa.Table(
    "offer",
    METADATA,
    sa.Column("job", sa.Text, primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("device", sa.Text, primary_key=True),
    sa.Column("declined", sa.Text),
    _round_key(),
)
upload_table = sa.Table(
    "upload",
    METADATA,
    sa.Column("job", sa.Text, primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("device", sa.Text, primary_key=True),
    sa.Column("verdict", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("samples", sa.BigInteger, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("metrics", sa.Text, nullable=False),
    sa.Column("blocks", sa.Text, nullable=False),
    sa.Column("conflicts", sa.Integer, nullable=False, default=0),
    sa.Column("voided", sa.Boolean, nullable=False, default=False),
    sa.Column("created_s", sa.Float, nullable=False),
    _round_key(),
)
partial_table = sa.Table(
    "partial",
    METADATA,
    sa.Column("job", sa.Text, primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("block", sa.Text, primary_key=True),
    sa.Column("slot", sa.Integer, primary_key=True),
    sa.Column("crc", sa.BigInteger, nullable=False),
    sa.Column("samples", sa.BigInteger, nullable=False),
    sa.Column("devices", sa.Integer, nullable=False),
    sa.Column("num", sa.LargeBinary, nullable=False),
    _round_key(),
)
version_table = sa.Table(
    "version",
    METADATA,
    sa.Column("job", sa.Text, sa.ForeignKey("job.id"), primary_key=True),
    sa.Column("v", sa.Integer, autoincrement=False, primary_key=True),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("sha", sa.Text, nullable=False),
    sa.Column("parent", sa.Text, nullable=False),
    sa.Column("samples", sa.BigInteger, nullable=False),
    sa.Column("devices", sa.Integer, nullable=False),
    sa.Column("created_s", sa.Float, nullable=False),
    sa.UniqueConstraint("job", "round"),
)


class ConnectionLost(StateError):
    """The database went away; whether the last commit took place is unknown."""


class Database:
    """One database, open. Transactions from any thread; what fails is a StateError."""

    def __init__(self, engine: Engine, where: str, lock: DirectoryLock | None) -> None:
        self.where = where
        self.is_postgresql = engine.dialect.name == "postgresql"
        self.insert: Callable[[sa.Table], Any] = (
            postgresql.insert if self.is_postgresql else sqlite.insert
        )
        self._engine, self._lock = engine, lock
        self._readers = engine.execution_options(read_only=True)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, where: str | Path, *, exclusive: bool) -> Database:
        """The database in a state directory or at a URL, created when there is none.

        exclusive: refuse a directory that another process has open, and check an SQLite file.
        """
        if "://" in str(where):
            url = _parsed(str(where))
        else:
            url = URL.create("sqlite", database=str(Path(where) / LEDGER_FILE))
        if url.get_backend_name() == "postgresql":
            return cls(_postgresql_engine(url), url.render_as_string(), None)
        if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
            raise StateError(
                f"{url.render_as_string()}: the ledger needs a state directory, sqlite:///FILE "
                "or postgresql://USER@HOST/NAME"
            )
        path = Path(url.database)
        make_directory(path.parent)
        lock = DirectoryLock(path.parent) if exclusive else None
        try:
            _prepare_file(path)
            return cls(_sqlite_engine(path), str(path), lock)
        except BaseException:
            if lock is not None:
                lock.release()
            raise

    def close(self) -> None:
        """Close all connections and let another process have the directory."""
        self._engine.dispose()
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is committed at the end, or undone by whatever is raised in it."""
        with self._named_errors(), self._engine.begin() as db:
            yield db

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database and keeps no writer waiting."""
        with self._named_errors(), self._readers.begin() as db:
            yield db

    def repeated(self, work: Callable[[], T]) -> T:
        """Run ``work`` again when the connection is lost; it must do no harm the second time."""
        for _ in range(COMMIT_ATTEMPTS - 1):
            try:
                return work()
            except ConnectionLost:
                continue
        return work()

    def _prepare(self) -> None:
        with self.write() as db:
            if self.is_postgresql:
                db.execute(sa.select(sa.func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
            elif self._lock is not None:
                found = str(db.exec_driver_sql("PRAGMA quick_check(1)").scalar())
                if found != "ok":
                    what = " ".join(found.split())
                    raise StateError(f"{self.where} is damaged ({what}); {_DAMAGED_STEP}")
            tables = set(sa.inspect(db).get_table_names())
            if tables and schema_table.name not in tables and not self.is_postgresql:
                raise StateError(
                    f"{self.where} is the database of another program (it has table "
                    f"{min(tables)!r}): choose another state directory"
                )
            METADATA.create_all(db)
            stored = db.execute(sa.select(schema_table.c.version)).scalar()
            if stored is None:
                db.execute(sa.insert(schema_table).values(version=SCHEMA_VERSION))
            elif stored != SCHEMA_VERSION:
                raise StateError(
                    f"{self.where} has schema {stored}, this server knows {SCHEMA_VERSION}: it was "
                    "written by a newer version; upgrade the server, or choose another state "
                    "directory"
                )

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.IntegrityError as error:
            raise ProtocolMisuse(f"{self.where} refused a row: {error.orig}") from error
        except sa.exc.DBAPIError as error:
            text = " ".join(str(error.orig).split())
            if error.connection_invalidated:
                raise ConnectionLost(f"{self.where}: {text}; start the database again") from error
            raise StateError(f"{self.where}: {text}; {_next_step(text)}") from error


_DAMAGED_STEP = "restore a copy of it, or choose another state directory"
_NEXT_STEPS = {
    "full": "free some space on its disk",
    "disk i/o": "check its disk, and that it is not full",
    "readonly": "make it writable for this user, or choose another state directory",
    "unable to open": "make its directory writable for this user",
    "not a database": "choose another state directory, or move the file away",
    "malformed": _DAMAGED_STEP,
    "locked": "stop the other process that writes to it",
    "too big": "cut the model into smaller blocks",
}


def _next_step(text: str) -> str:
    for sign, step in _NEXT_STEPS.items():
        if sign in text.lower():
            return step
    return "check the database and its address"


def _parsed(text: str) -> URL:
    try:
        return make_url(text)
    except sa.exc.ArgumentError as error:
        raise StateError(f"the database URL cannot be read: {error}") from None


def _prepare_file(path: Path) -> None:
    # SQLite gives its log and index files the mode of the database, so this covers them too.
    with disk_errors("open", path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(handle).st_mode & 0o077:
                os.fchmod(handle, 0o600)
            head = os.read(handle, 16)
        finally:
            os.close(handle)
    if head and head != b"SQLite format 3\0":
        raise StateError(f"{path} is not a database; {_NEXT_STEPS['not a database']}")


def _sqlite_engine(path: Path) -> Engine:
    engine = sa.create_engine(
        URL.create("sqlite", database=str(path)), connect_args={"timeout": BUSY_TIMEOUT_S}
    )

    @sa.event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        # The driver's own idea of when to begin a transaction would defeat BEGIN IMMEDIATE.
        connection.isolation_level = None
        mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise StateError(
                f"{path}: this file system gives SQLite journal mode {mode!r} instead of a "
                "write-ahead log; put the state directory on a local disk"
            )
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA trusted_schema=OFF")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        read_only = connection.get_execution_options().get("read_only", False)
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def _postgresql_engine(url: URL) -> Engine:
    try:
        return sa.create_engine(
            url,
            isolation_level="READ COMMITTED",
            pool_pre_ping=True,
            connect_args={"options": "-c synchronous_commit=on"},
        )
    except ImportError as error:
        raise StateError(
            f"{url.render_as_string()}: the driver {error.name!r} is not installed; install it, "
            "or leave the URL out to use SQLite"
        ) from error

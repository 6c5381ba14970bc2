"""The file of a catalogue: one SQLite database, the truth about its photos and their embeddings.

Everything is written in transactions, under a write-ahead log: a process that is ended, or a disk
that is full, leaves the last whole batch, and readers go on reading while one process writes. The
schema below says what a row is. Whatever SQLite refuses is told in one line.
"""

import contextlib
import itertools
import os
import re
import shlex
import sqlite3
import stat
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from cbam_jax import InputError
from cbam_jax.catalogue import checksums
from cbam_jax.foreign_files import expanded, is_gone, shown

_APPLICATION = 0xCBA3  # SQLite's application_id: whose file this is.
_VERSION = 1
_WAIT = 30  # Seconds to wait for another process that writes.
_LONGEST = 64 << 20  # Bytes of a row or a value: a damaged one can claim a gigabyte.
# Steps of SQLite's machine between two looks at how many are left, and what is left: so many a byte
# of the file, and so many looks. A row takes some ten steps, and has dozens of bytes.
_STEPS, _PATIENCE = 100_000, 20
_AMONG = 500  # Values of one query: SQLite takes 999 at least.
# What SQLite itself keeps in a database: the last id of a table, statistics.
_SQLITES = re.compile(r"CREATE TABLE sqlite_(sequence|stat\d)\([\w,]+\)")
_SCHEMA = (
    "CREATE TABLE about (key TEXT PRIMARY KEY, value) WITHOUT ROWID",
    # A photo. Its id is never used again. hash: SHA-256 of the file; modified and seen: when the
    # file was written and when it was read, in ns; box: 'x1,y1,x2,y2' or ''; look: its perceptual
    # hash; problem: why there is no embedding. The embedding, float32, comes last: SQLite then
    # lists the other columns without reading it.
    """CREATE TABLE item (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        path TEXT NOT NULL UNIQUE,
        hash BLOB,
        size INTEGER,
        modified INTEGER,
        seen INTEGER,
        box TEXT NOT NULL DEFAULT '',
        payload TEXT NOT NULL DEFAULT '{}',
        look INTEGER,
        problem TEXT,
        embedding BLOB)""",
    "CREATE INDEX item_hash ON item (hash)",
    # Embeddings of another model, until all are there: see rebuild.
    "CREATE TABLE rebuilt (id INTEGER PRIMARY KEY, hash BLOB, problem TEXT, embedding BLOB)",
)


class Kept(NamedTuple):
    """What the file says of a photo, but for its embedding; the schema above says what each is."""

    id: int
    path: str
    hash: bytes | None
    size: int | None
    modified: int | None
    seen: int | None
    box: str
    payload: str
    look: int | None
    problem: str | None


_TYPES = tuple(Kept.__annotations__.values())


class Store:
    """An open catalogue file; ``with`` closes it.

    Args:
        path: of the file.
        create: make it where there is none.

    Raises:
        InputError: there is none, it is something else, or it is damaged.

    Example:
        >>> import tempfile
        >>> with Store(Path(tempfile.mkdtemp()) / "shop.db", create=True) as store:
        ...     with store.transaction():
        ...         _ = store.run("INSERT INTO item (path) VALUES ('/a.jpg')")
        ...     store.rows("SELECT id, path FROM item"), store.about("revision")
        ([(1, '/a.jpg')], 1)
    """

    def __init__(self, path: str | os.PathLike, *, create: bool = False):
        self.path = expanded(path)
        there = os.path.lexists(self.path)
        if not there and not is_gone(self.path):
            raise InputError(f"the catalogue {self.path} may not be read: make its folder readable")
        if not os.path.isfile(self.path) and (there or not create):  # SQLite waits for a pipe.
            what = "is no file" if there else "is not there"
            raise InputError(
                f"the catalogue {self.path} {what}: make one with "
                f"`cbam-jax catalogue add {shlex.quote(str(self.path))} PHOTOS`"
            )
        _check_beside(self.path)
        with self._told():
            self._connection = _connect(self.path)
        try:
            with self._told():
                self._check(create)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was committed is in it."""
        self._connection.close()

    def rows(self, sql: str, values: Iterable[Any] = ()) -> list[tuple]:
        """Return the rows that a query selects."""
        with self._told():
            return self._execute(sql, values).fetchall()

    def among(self, sql: str, some: Iterable[Any], values: Iterable[Any] = ()) -> list[tuple]:
        """Return the rows of a query that ends with what is to be one of ``some``."""
        listed, before, rows = list(some), tuple(values), []
        for start in range(0, len(listed), _AMONG):
            part = listed[start : start + _AMONG]
            marks = ",".join("?" * len(part))
            rows += self.rows(f"{sql} IN ({marks})", [*before, *part])
        return rows

    def stream(self, sql: str, values: Iterable[Any] = ()) -> Iterator[tuple]:
        """Yield the rows that a query selects, without holding them all."""
        with self._told():
            # Not `yield from`: that closes the cursor of an abandoned stream, an error by then
            # where the database was closed before.
            for row in self._execute(sql, values):  # noqa: UP028
                yield row

    def _execute(self, sql: str, values: Iterable[Any]) -> sqlite3.Cursor:
        """A query, which ends: pages that name each other may hold rows without an end.

        So the steps of SQLite's machine are counted, and are far fewer for a file of its size.
        """
        left = itertools.count(_PATIENCE * _held(self.path) // _STEPS + _PATIENCE, -1)
        self._connection.set_progress_handler(lambda: next(left) < 0, _STEPS)
        return self._connection.execute(sql, tuple(values))

    def embeddings(self) -> Iterator[tuple]:
        """Yield each photo's id, embedding and the embedding's sum, by id; a sum may be None."""
        with self._told():
            kept = checksums.are_kept(self._connection, "checksum")
        value, join = ("value", "LEFT JOIN checksum USING (id)") if kept else ("NULL", "")
        yield from self.stream(
            f"SELECT id, embedding, {value} FROM item {join} "
            "WHERE embedding IS NOT NULL ORDER BY id"
        )

    def kept(
        self,
        condition: str = "1",
        values: Iterable[Any] = (),
        *,
        among: tuple[str, Iterable[Any]] | None = None,
    ) -> Iterator[Kept]:
        """Yield what is kept of photos, by id.

        Args:
            condition: of SQL, on the table of photos, with its values.
            among: a column, and values of which it has one; then in whatever order.

        Raises:
            InputError: names the first that is not as it was written.
        """
        for row, whole in self._with_sums(condition, values, among):
            if whole is False:
                raise InputError(
                    f"{self.path}: what is known of photo {row.id} is not as it was written: "
                    f"forget it by `cbam-jax catalogue remove {shlex.quote(str(self.path))} "
                    f"{row.id}` and add it again, or put a copy of the catalogue in its place"
                )
            yield row

    def wholes(self) -> Iterator[tuple[int, bool | None]]:
        """Yield whether what is kept of each photo is as it was written; None: it has no sum."""
        return ((row.id, whole) for row, whole in self._with_sums("1", (), None))

    def _with_sums(
        self, condition: str, values: Iterable[Any], among: tuple[str, Iterable[Any]] | None
    ) -> Iterator[tuple[Kept, bool | None]]:
        with self._told():
            kept = checksums.are_kept(self._connection, "text_checksum")
        known = "text_checksum.id, value" if kept else "id, NULL"
        join = "LEFT JOIN text_checksum USING (id)" if kept else ""
        sql = f"SELECT {', '.join(Kept._fields)}, {known} FROM item {join} WHERE {condition}"
        if among is None:
            rows = self.stream(f"{sql} ORDER BY id", values)
        else:
            rows = self.among(f"{sql} AND {among[0]}", among[1], values)
        last = None
        for *row, noted, sum_ in rows:  # A row that nobody noted has been another's.
            if among is None and last is not None and row[0] <= last:
                raise damaged(self.path, f"photo {row[0]} comes behind photo {last}")
            last = row[0]
            # SQLite keeps a value of any type in any column.
            typed = all(isinstance(value, type_) for value, type_ in zip(row, _TYPES, strict=True))
            unknown = typed and noted is not None and sum_ is None
            whole = typed and sum_ == checksums.text_sum(*row[1:])
            yield Kept(*row), None if unknown else whole

    def complete(self) -> None:
        """Compute the sums that are due, also where there were none."""
        with self._told():
            due = checksums.are_due(self._connection)
        if due:
            with self.transaction(revised=False):
                pass

    def run(self, sql: str, values: Iterable[Any] = ()) -> int:
        """Change rows, inside a transaction; return the id of the row that was inserted."""
        return self._connection.execute(sql, tuple(values)).lastrowid or 0

    def about(self, key: str) -> Any:
        """Return what is known of the catalogue as a whole, None where it is not."""
        found = self.rows("SELECT value FROM about WHERE key = ?", [key])
        return found[0][0] if found else None

    def tell(self, **values: Any) -> None:
        """Set what is known of the catalogue, inside a transaction."""
        for pair in values.items():
            self.run("INSERT OR REPLACE INTO about VALUES (?, ?)", pair)

    @contextlib.contextmanager
    def transaction(self, *, revised: bool = True) -> Iterator[None]:
        """All that is changed in the block, or nothing.

        The catalogue's revision goes up by one, unless no embedding is ``revised``.
        """
        with self._told():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                checksums.complete(self._connection)
                if revised:
                    self.run("UPDATE about SET value = value + 1 WHERE key = 'revision'")
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # A full disk has rolled back already.
                    self._connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Whatever is read in the block is of one moment, though others write meanwhile."""
        with self._told():
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                self._connection.execute("ROLLBACK")

    def _check(self, create: bool) -> None:
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if application == _APPLICATION and version == _VERSION:
            self._check_schema()
            return
        if application == _APPLICATION:
            raise InputError(
                f"the catalogue {self.path} is of version {version}, this program of {_VERSION}: "
                "use the program that made it, or make another one"
            )
        (tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables or not create:
            raise InputError(f"{self.path} is no catalogue: name one, or a file that is not there")
        self._create()

    def _check_schema(self) -> None:
        """Raise an InputError where the file does more than hold rows.

        A view in a table's place, a computed column or a trigger of a stranger's would run within
        each statement here, and may never end. SQLite goes by the statements alone, whatever
        name its list gives them.
        """
        known = {" ".join(statement.split()) for statement in (*_SCHEMA, *checksums.statements())}
        for (sql,) in self._connection.execute("SELECT sql FROM sqlite_master WHERE sql NOTNULL"):
            statement = " ".join(str(sql).split())
            if statement not in known and not _SQLITES.fullmatch(statement):
                raise InputError(
                    f"{self.path} holds more than a catalogue does ({shown(statement, 80)}): take "
                    "that away with the program that made it, or add the photos to another one"
                )

    def _create(self) -> None:
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("BEGIN IMMEDIATE")
        (tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables:  # Another process may have been the first.
            for statement in _SCHEMA:
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._connection.execute(f"PRAGMA user_version = {_VERSION}")
            self.tell(identity=uuid.uuid4().hex, revision=0)
        self._connection.execute("COMMIT")

    def check_pages(self) -> None:
        """Read the whole file, and raise an InputError where it does not hold together."""
        ((found, *_), *_) = self.rows("PRAGMA quick_check(1)")
        if found != "ok":
            raise damaged(self.path, found)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What SQLite refuses, in one line."""
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:  # Its message may hold any bytes.
            raise InputError(_told(self.path, error)) from error


def check_place(path: Path) -> None:
    """Raise an InputError where a catalogue is not there and cannot be made.

    >>> check_place(Path("/nowhere/shop.db"))
    Traceback (most recent call last):
    ...
    cbam_jax.InputError: the folder /nowhere of the catalogue is not there: make it, or name another
    """
    if is_gone(path.parent):
        raise InputError(
            f"the folder {path.parent} of the catalogue is not there: make it, or name another"
        )
    if not os.access(path.parent, os.W_OK | os.X_OK) and not os.access(path, os.R_OK):
        raise InputError(
            f"the folder {path.parent} of the catalogue may not be written to: name another, or "
            "make it writable"
        )


def _held(path: Path) -> int:
    """Bytes that a database has on the disk, with its log."""
    files = [name for name in (f"{path}", f"{path}-wal") if os.path.exists(name)]
    states = map(os.stat, files)
    return sum(min(s.st_size, 512 * getattr(s, "st_blocks", s.st_size)) for s in states)


def _check_beside(path: Path) -> None:
    """Raise an InputError where SQLite would write elsewhere, by a link in a stranger's folder."""
    for ending in ("-wal", "-shm", "-journal"):
        beside = os.path.realpath(path) + ending
        if not os.path.lexists(beside):
            continue
        status = os.lstat(beside)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise InputError(
                f"{shown(beside)} is a link, or no file, and SQLite would write to it: move it away"
            )


def damaged(path: Path, reason: str) -> InputError:
    """What is said, in one line, of a file that is not as it was written.

    >>> str(damaged(Path("shop.db"), "photo 3 is\\nnone"))[:54]
    'shop.db is damaged or no catalogue (photo 3 is none): '
    """
    return InputError(
        f"{path} is damaged or no catalogue ({shown(' '.join(reason.split()))}): put a copy in its "
        "place, or move it away and add the photos again"
    )


def _connect(path: Path) -> sqlite3.Connection:
    """Open a database for writing, or for reading where that alone is allowed."""
    writable = os.access(path.parent, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))
    if writable:
        connection = _distrusting(path)
        connection.execute("PRAGMA synchronous = FULL")
        return connection
    # Readers of a log write beside it; without a log the file is read as it lies there.
    log = path.with_name(path.name + "-wal")
    mode = "mode=ro" if log.exists() and log.stat().st_size else "immutable=1"
    address = f"{path.absolute().as_uri()}?{mode}"
    return _distrusting(address, uri=True)


def _distrusting(address: str | Path, *, uri: bool = False) -> sqlite3.Connection:
    """Connect; triggers and views, which others may have put there, call nothing with effects."""
    connection = sqlite3.connect(address, uri=uri, timeout=_WAIT, isolation_level=None)
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
    checksums.allow(connection)
    return connection


def _told(path: Path, error: Exception) -> str:
    text = shown(" ".join(str(error).split()))  # It may quote a damaged schema.
    if text == "interrupted":
        return str(damaged(path, "it has more rows than bytes for them"))
    if "locked" in text:
        return (
            f"another process has been writing to {path} for {_WAIT} s: wait until it has ended; "
            "nothing that was written before is lost"
        )
    if "full" in text:
        return (
            f"no space is left for {path}: free some and give the same command again; "
            "all batches before this one are kept"
        )
    if "readonly" in text:
        return f"{path} may only be read: make the file and its folder writable, or copy it"
    if "unable to open" in text:
        return f"cannot open {path}: it needs a folder that is there and may be written to"
    signs = ("malformed", "not a database", "user-defined function", "decode to UTF-8")
    if isinstance(error, UnicodeDecodeError) or any(sign in text for sign in signs):
        return str(damaged(path, text))
    return f"{path}: {text}"

"""A sum of each photo's embedding and one of its texts, by which a changed byte is noticed.

SQLite has no checksums of its own. Triggers note each row that was written, whoever wrote it; its
sums are computed before the transaction ends. A catalogue from before there were sums is given them
when it is next written to, and is read as it stands until then.
"""

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from typing import Any

import numpy as np

# What a row says but for its embedding.
TEXTS = ("path", "hash", "size", "modified", "seen", "box", "payload", "look", "problem")
# The table of each sum, and the columns that it is of: a row has it where the first is not NULL.
_SUMS = {"checksum": ("embedding",), "text_checksum": TEXTS}


def _schema(table: str, columns: Sequence[str]) -> list[str]:
    note = f"INSERT INTO {table} SELECT NEW.id, NULL WHERE NEW.{columns[0]} IS NOT NULL"
    forget = f"DELETE FROM {table} WHERE id = OLD.id"
    changed = f"UPDATE OF {', '.join(columns)}"
    return [
        # value: NULL of a row that was written without one, by another program.
        f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, value INTEGER)",
        f"CREATE INDEX {table}_due ON {table} (id) WHERE value IS NULL",
        f"CREATE TRIGGER {table}_added AFTER INSERT ON item BEGIN {note}; END",
        f"CREATE TRIGGER {table}_changed AFTER {changed} ON item BEGIN {forget}; {note}; END",
        f"CREATE TRIGGER {table}_removed AFTER DELETE ON item BEGIN {forget}; END",
        f"INSERT INTO {table} SELECT id, NULL FROM item WHERE {columns[0]} IS NOT NULL",
    ]


def statements() -> list[str]:
    """Those that the tables and triggers of the sums are made by.

    >>> statements()[0]
    'CREATE TABLE checksum (id INTEGER PRIMARY KEY, value INTEGER)'
    """
    made = [statement for table, columns in _SUMS.items() for statement in _schema(table, columns)]
    return [statement for statement in made if statement.startswith("CREATE ")]


def row_sums(embeddings: np.ndarray) -> np.ndarray:
    """The sum of each row's bytes, eight of them a number, modulo 2**64: [n] int64.

    Every single changed byte changes it, and anything else but by chance; it costs no more than
    reading them does, a tenth of a CRC.

    >>> row_sums(np.array([[1, 2], [1, 3]], np.float32)).tolist()
    [4611686019492741120, 4629700418002223104]
    """
    count = np.int32 if embeddings.shape[1] % 2 else np.int64
    return embeddings.view(count).sum(axis=1, dtype=np.int64)


def text_sum(*values: Any) -> int:
    """The sum of what a row says in `TEXTS`: 64 bits of a hash."""
    told = [value.hex() if isinstance(value, bytes) else value for value in values]
    digest = hashlib.blake2b(json.dumps(told).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def allow(connection: sqlite3.Connection) -> None:
    """Let the statements of a connection use the sums."""
    connection.create_function("sum_of_checksum", 1, _row_sum, deterministic=True)
    connection.create_function("sum_of_text_checksum", len(TEXTS), text_sum, deterministic=True)


def _row_sum(embedding: object) -> int:
    if not isinstance(embedding, bytes) or len(embedding) % 4:
        return 0  # No embedding, which is told where it is read.
    return int(row_sums(np.frombuffer(embedding, np.float32)[None])[0])


def are_kept(connection: sqlite3.Connection, table: str) -> bool:
    """Whether a catalogue has these sums."""
    sql = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    return connection.execute(sql, [table]).fetchone() is not None


def are_due(connection: sqlite3.Connection) -> bool:
    """Whether `complete` would compute any."""
    due = "SELECT 1 FROM {} WHERE value IS NULL LIMIT 1"
    return any(
        not are_kept(connection, table) or connection.execute(due.format(table)).fetchone()
        for table in _SUMS
    )


def complete(connection: sqlite3.Connection) -> None:
    """Compute the sums that are due, inside a transaction; of all rows where there were none."""
    for table, columns in _SUMS.items():
        for statement in () if are_kept(connection, table) else _schema(table, columns):
            connection.execute(statement)
        sum_of = f"SELECT sum_of_{table}({', '.join(columns)}) FROM item WHERE id = {table}.id"
        connection.execute(f"UPDATE {table} SET value = ({sum_of}) WHERE value IS NULL")

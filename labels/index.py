"""The index of an SAE's latents: labels with their history, full-text search, statistics, examples and effects.

One SQLite file. `features` holds a row a latent and points at its newest label; `labels` only grows; `words` is an FTS5
table without content whose rowid is the latent. Examples and effects are one packed blob a latent (`packing.py`) over a
table of token bytes. `query.py` owns the search grammar.

A file is made by `LabelIndex.create` and opened by `LabelIndex(path)`, which runs the migrations it lacks; what ships
is opened with `read_only=True`, as immutable. An index may be used from several threads: it has one connection, and a
lock lets one call at a time through. The file is untrusted: what is not an index, newer than we are, or cut short is
refused in one sentence (`LabelError`, a ValueError, or OSError).
"""

from __future__ import annotations

import codecs
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

from labels import packing, schema
from labels.errors import LabelError
from labels.layer import lay
from labels.packing import Kind, RawExample
from labels.query import Query, parse, plain

APPLICATION_ID: Final = 0x5354_4C42
"""`STLB` in the file's header: what tells an index from any other SQLite file."""


@dataclass(frozen=True, slots=True)
class Label:
    """What somebody called a latent, and when (ISO 8601, UTC). An empty text takes the label away."""

    latent: int
    text: str
    author: str
    created: str
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Feature:
    """A latent as a person sees it. `label` and `author` are "" when it has none; `density` is a share of tokens."""

    latent: int
    label: str
    author: str
    max_activation: float | None
    mean_on: float | None
    density: float | None
    sweet: float | None = None
    """The strength at which it steers best and the one at which text falls apart, in units of its max; None while
    unknown, or where there is none."""
    cliff: float | None = None
    steerability: float | None = None
    """The effect at the sweet spot."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """How a latent answered to being pushed, and when that was measured (ISO 8601, UTC)."""

    latent: int
    sweet: float | None
    cliff: float | None
    steerability: float | None
    data: str
    """All trials, as JSON."""
    made: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """A window of text around the token (`peak`, 0-based in the window) that the example was kept for."""

    tokens: tuple[str, ...]
    """Their texts; empty while a character is incomplete, whose text then comes with the token that completes it."""
    activations: tuple[float, ...]
    kind: Kind
    peak: int


class LabelIndex:
    """An open index. A context manager; `close` may be called twice."""

    def __init__(self, path: str | Path, *, read_only: bool = False, layer: Path | None = None) -> None:
        """`layer` is another index, where there is one, whose calibrations stand before this one's: what a user has
        measured for an index that is not to be written. `notice` says so where it had to be left out."""
        self.path, self.read_only = Path(path), read_only
        self._lock = threading.RLock()
        schema.check_header(self.path)
        mode = "mode=ro&immutable=1" if read_only else "mode=rw"
        self._db = self._connect(mode)
        try:
            with self._plainly():
                self._check_schema()
                self.notice = lay(self._db, layer)
        except BaseException:
            self._db.close()
            raise

    @classmethod
    def create(cls, path: str | Path, meta: Mapping[str, str] | None = None) -> LabelIndex:
        """A new, empty index at `path`, which must not exist."""
        path = Path(path)
        with path.open("xb"):  # FileExistsError and FileNotFoundError name the path themselves
            pass
        db = sqlite3.connect(path, isolation_level=None)
        try:
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute("CREATE TABLE migrations (name TEXT PRIMARY KEY, applied TEXT NOT NULL) WITHOUT ROWID")
        finally:
            db.close()
        index = cls(path)
        index.write_meta(meta or {})
        return index

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._db.close()

    # Reading

    def meta(self) -> dict[str, str]:
        """What the index says about itself: hashes by file (`sae/...`), `hook`, `d_sae` and what else was written."""
        return dict(self._rows("SELECT key, value FROM meta ORDER BY key"))

    def search(self, query: str, limit: int = 50) -> list[Feature]:
        """The features that `query` finds (grammar: `labels.query`): best match first, then the strongest.

        Without words in the query the order is by latent. A malformed filter is a ValueError.
        """
        parsed = parse(query)
        order = "words.rank, f.max_activation DESC, f.latent" if parsed.match else "f.latent"
        order = f"{parsed.order} DESC, f.latent" if parsed.order else order
        sql = f"SELECT {_FEATURE} {_from(parsed)} ORDER BY {order} LIMIT ?"
        return [Feature(*row) for row in self._rows(sql, [*_values(parsed), limit])]

    def count(self, query: str) -> int:
        """How many features `query` finds."""
        parsed = parse(query)
        return int(self._rows(f"SELECT count(*) {_from(parsed)}", _values(parsed))[0][0])

    def feature(self, latent: int) -> Feature | None:
        """The feature, or None when the index has no such latent."""
        rows = self._rows(f"SELECT {_FEATURE} {_from(Query())} WHERE f.latent = ?", [latent])
        return Feature(*rows[0]) if rows else None

    def labels_of(self, latents: Iterable[int]) -> dict[int, str]:
        """The labels of those of `latents` that have one."""
        wanted = ",".join(str(int(latent)) for latent in latents)
        sql = (
            "SELECT f.latent, l.text FROM json_each(?) j JOIN features f ON f.latent = j.value "
            "JOIN labels l ON l.id = f.label"
        )
        return {latent: text for latent, text in self._rows(sql, [f"[{wanted}]"]) if text}

    def examples(self, latent: int, kind: Kind | None = None, limit: int | None = None) -> list[Example]:
        """The latent's examples, strongest first among `top`; all kinds unless one is named."""
        raw = [example for example in self.raw_examples(latent) if kind in (None, example.kind)][:limit]
        texts = self._bytes_of({token for example in raw for token in example.tokens})
        return [
            Example(_decode(texts[token] for token in tokens), tuple(activations), kind, peak)
            for tokens, activations, kind, peak in raw
        ]

    def raw_examples(self, latent: int) -> list[RawExample]:
        """The latent's examples with token ids in place of texts."""
        rows = self._rows("SELECT data FROM examples WHERE latent = ?", [latent])
        with self._plainly():
            return packing.unpack_examples(rows[0][0]) if rows else []

    def token_bytes(self) -> dict[int, bytes]:
        """The bytes of every token id that examples and effects use."""
        return dict(self._rows("SELECT id, bytes FROM tokens"))

    def raw_effects(self, latent: int) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """The token ids that the latent pushes up and those it pushes down, as `effects` has their texts."""
        rows = self._rows("SELECT data FROM effects WHERE latent = ?", [latent])
        with self._plainly():
            up, down = packing.unpack_effects(rows[0][0]) if rows else ([], [])
        return list(up), list(down)

    def effects(self, latent: int) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
        """The tokens that the latent pushes up and those it pushes down, strongest first, with the logit per unit."""
        both = self.raw_effects(latent)
        texts = self._bytes_of({token for side in both for token, _ in side})
        up, down = ([(texts[token].decode("utf-8", "replace"), value) for token, value in side] for side in both)
        return up, down

    def histogram(self, latent: int) -> tuple[int, ...]:
        """How often the latent had which activation: counts of equal bins from 0 to its max; () when not recorded."""
        rows = self._rows("SELECT histogram FROM features WHERE latent = ? AND histogram IS NOT NULL", [latent])
        with self._plainly():
            return packing.unpack_histogram(rows[0][0]) if rows else ()

    def history(self, latent: int) -> list[Label]:
        """Every label that the latent has had, the present one first."""
        sql = "SELECT latent, text, author, created, score FROM labels WHERE latent = ? ORDER BY id DESC"
        return [Label(*row) for row in self._rows(sql, [latent])]

    def all_labels(self) -> list[Label]:
        """Every label ever given, oldest first."""
        return [
            Label(*row) for row in self._rows("SELECT latent, text, author, created, score FROM labels ORDER BY id")
        ]

    def calibration(self, latent: int) -> Calibration | None:
        """How the latent answered to being pushed, or None when nobody has tried."""
        sql = "SELECT latent, sweet, cliff, steerability, data, made FROM calibration WHERE latent = ?"
        rows = self._rows(sql, [latent])
        return Calibration(*rows[0]) if rows else None

    def latents(self) -> list[int]:
        """The latents in the index, in order."""
        return [row[0] for row in self._rows("SELECT latent FROM features ORDER BY latent")]

    # Writing

    def write_meta(self, meta: Mapping[str, str]) -> None:
        """Adds to what the index says about itself."""
        with self._transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)", [(key, str(value)) for key, value in meta.items()]
            )

    def add_label(
        self, latent: int, text: str, author: str, *, score: float | None = None, created: str | None = None
    ) -> Label:
        """The latent's new label; earlier ones stay in its history. A latent outside the SAE is a ValueError."""
        label = Label(latent, " ".join(plain(text).split()), plain(author), created or _now(), score)
        self.add_labels([label])
        return label

    def add_labels(self, labels: Iterable[Label]) -> None:
        """Makes each label the present one of its latent, all of them or none."""
        with self._transaction() as db:
            row = db.execute("SELECT value FROM meta WHERE key = 'd_sae'").fetchone()
            for label in labels:
                if label.latent < 0 or (row and label.latent >= int(row[0])):
                    size = f"an SAE of {row[0]} latents" if row else "any SAE"
                    raise LabelError(f"there is no latent {label.latent} in {size}")
                _set_label(db, label)

    def write_features(
        self,
        latents: Sequence[int],
        max_activation: Sequence[float],
        mean_on: Sequence[float],
        density: Sequence[float],
        histograms: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Sets the statistics of `latents`, one number (and histogram) each; labels stay."""
        packed = [packing.pack_histogram(each) if each else None for each in histograms or [()] * len(latents)]
        rows = zip(
            map(int, latents), *(map(float, each) for each in (max_activation, mean_on, density)), packed, strict=True
        )
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO features (latent, max_activation, mean_on, density, histogram) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (latent) DO UPDATE SET max_activation = excluded.max_activation, "
                "mean_on = excluded.mean_on, density = excluded.density, histogram = excluded.histogram",
                rows,
            )

    def write_tokens(self, tokens: Mapping[int, bytes]) -> None:
        """Adds the bytes of token ids that examples and effects use."""
        with self._transaction() as db:
            db.executemany("INSERT OR REPLACE INTO tokens VALUES (?, ?)", tokens.items())

    def write_examples(self, examples: Iterable[tuple[int, Sequence[RawExample]]]) -> None:
        """Replaces the examples of each latent given."""
        with self._transaction() as db:
            rows = ((latent, packing.pack_examples(each)) for latent, each in examples)
            db.executemany("INSERT OR REPLACE INTO examples VALUES (?, ?)", rows)

    def write_effects(
        self, effects: Iterable[tuple[int, Sequence[tuple[int, float]], Sequence[tuple[int, float]]]]
    ) -> None:
        """Replaces the effects of each latent given: (latent, promoted, suppressed), lists of (token id, value)."""
        with self._transaction() as db:
            rows = ((latent, packing.pack_effects(up, down)) for latent, up, down in effects)
            db.executemany("INSERT OR REPLACE INTO effects VALUES (?, ?)", rows)

    def write_calibrations(self, calibrations: Iterable[Calibration]) -> None:
        """Replaces the calibration of each latent given."""
        with self._transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO calibrations (latent, sweet, cliff, steerability, data, made) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                ((c.latent, c.sweet, c.cliff, c.steerability, c.data, c.made or _now()) for c in calibrations),
            )

    def compact(self) -> None:
        """Makes the file as small as it can be, for shipping."""
        self._refuse_read_only()
        with self._lock, self._plainly():
            self._db.execute("INSERT INTO words (words) VALUES ('optimize')")
            self._db.execute("VACUUM")

    # Inside

    def _connect(self, mode: str) -> sqlite3.Connection:
        uri = f"file:{quote(str(self.path.absolute()))}?{mode}"
        return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)

    def _check_schema(self) -> None:
        if self._db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise LabelError(f"`{self.path}` is an SQLite file but not a label index")
        done = {name for (name,) in self._db.execute("SELECT name FROM migrations")}
        missing = [migration for migration in schema.MIGRATIONS if migration.__name__ not in done]
        if (error := schema.mismatch(self.path, done, missing, self.read_only)) is not None:
            raise error
        for migration in missing:
            with self._transaction() as db:
                migration(db)
                db.execute("INSERT INTO migrations VALUES (?, ?)", (migration.__name__, _now()))

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock, self._plainly():
            return self._db.execute(sql, values).fetchall()

    def _bytes_of(self, tokens: Iterable[int]) -> dict[int, bytes]:
        wanted = sorted(tokens)
        sql = "SELECT id, bytes FROM tokens WHERE id IN (SELECT value FROM json_each(?))"
        return dict.fromkeys(wanted, b"\xff") | dict(self._rows(sql, [str(wanted)]))

    def _refuse_read_only(self) -> None:
        if self.read_only:
            raise PermissionError(f"the label index `{self.path}` is open for reading only")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._refuse_read_only()
        with self._lock, self._plainly():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        """Turns SQLite's errors into one sentence that names the file."""
        try:
            yield
        except sqlite3.ProgrammingError:
            raise
        except OverflowError as error:
            raise LabelError("a number is too large for the label index", "it holds up to 2^63 - 1") from error
        except sqlite3.OperationalError as error:
            raise OSError(f"cannot use the label index `{self.path}`: {error}") from error
        except sqlite3.DatabaseError as error:
            raise LabelError(f"the label index `{self.path}` is damaged: {error}") from error


_FEATURE: Final = (
    "f.latent, coalesce(l.text, ''), coalesce(l.author, ''), f.max_activation, f.mean_on, f.density, "
    "c.sweet, c.cliff, c.steerability"
)


def _from(query: Query) -> str:
    conditions = ["words MATCH ?"] * bool(query.match) + query.conditions
    source = "words JOIN features f ON f.latent = words.rowid" if query.match else "features f"
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    joins = "LEFT JOIN labels l ON l.id = f.label LEFT JOIN calibration c ON c.latent = f.latent"
    return f"FROM {source} {joins}{where}"


def _values(query: Query) -> list[str | int | float]:
    return [query.match] * bool(query.match) + query.values


def _set_label(db: sqlite3.Connection, label: Label) -> None:
    db.execute("INSERT OR IGNORE INTO features (latent) VALUES (?)", (label.latent,))
    old = "SELECT l.text FROM features f JOIN labels l ON l.id = f.label WHERE f.latent = ?"
    for (text,) in db.execute(old, (label.latent,)).fetchall():
        # A table without content must be told what it had indexed.
        old_words = (label.latent, *_sides(text))
        db.execute("INSERT INTO words (words, rowid, fires, promotes) VALUES ('delete', ?, ?, ?)", old_words)
    added = db.execute(
        "INSERT INTO labels (latent, text, author, created, score) VALUES (?, ?, ?, ?, ?)",
        (label.latent, label.text, label.author, label.created, label.score),
    )
    db.execute("UPDATE features SET label = ? WHERE latent = ?", (added.lastrowid, label.latent))
    db.execute("INSERT INTO words (rowid, fires, promotes) VALUES (?, ?, ?)", (label.latent, *_sides(label.text)))


def _sides(text: str) -> tuple[str, str]:
    fires, _, promotes = text.partition(" -> ")
    return fires, promotes


def _decode(pieces: Iterable[bytes]) -> tuple[str, ...]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return tuple(decoder.decode(piece) for piece in pieces)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

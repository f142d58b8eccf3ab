"""A document -> its sentences, and split text on disk.

Boundaries are those of `sentencex` (rules for about 300 languages, nothing to download). Only the places where a
sentence ends are taken from it, and the text between two of them from the document, so that joining the sentences
restores it exactly. White space goes with the sentence before it, that at the start with the first one.

Split text is a Parquet file with one sentence a row: `document` and `sentence` are numbers from 0, `text` is its text.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import TrainError

COLUMNS = ("document", "sentence", "text")
GROUP_CHARACTERS = 8 << 20
"""Text gathered before it is written as one row group."""
_SPACES = {
    code: " "
    for code in (0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
}  # fmt: skip
"""White space of several bytes, which sentencex 1.0 takes for one byte where it looks for initials, and then panics."""


@dataclass(frozen=True)
class SplitSummary:
    documents: int
    sentences: int
    bytes: int
    """of the Parquet file"""


def split_sentences(text: str, language: str = "en") -> list[str]:
    """The sentences of `text` in order; joined they are `text`. None is blank, unless all of `text` is: that is one."""
    import sentencex

    sentences: list[str] = []
    start = 0
    ends = [boundary["end_index"] for boundary in sentencex.get_sentence_boundaries(language, text.translate(_SPACES))]
    for end in [*ends[:-1], len(text)]:
        piece = text[start:end]
        start = end
        if sentences and (not piece.strip() or not sentences[-1].strip()):
            sentences[-1] += piece
        elif piece:
            sentences.append(piece)
    return sentences


def write_split(
    documents: Iterable[Iterable[str]], out: Path | str, on_progress: Callable[[int, int], None] | None = None
) -> SplitSummary:
    """Writes documents, each given as its sentences, to the Parquet file `out`, which appears when it is complete.

    Streamed: no more than a row group is held. `on_progress(documents, sentences)` is called after each group.
    """
    pyarrow, parquet = import_parquet(f"writing {out}")
    schema = pyarrow.schema([(name, pyarrow.int64()) for name in COLUMNS[:2]] + [(COLUMNS[2], pyarrow.large_string())])
    part = Path(f"{out}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[int, int, str]] = []
    n_documents = n_sentences = characters = 0
    try:
        with parquet.ParquetWriter(part, schema, compression="zstd") as writer:

            def flush() -> None:
                writer.write_table(pyarrow.table([*map(list, zip(*rows, strict=True))], schema=schema))
                rows.clear()
                if on_progress:
                    on_progress(n_documents, n_sentences)

            for number, sentences in enumerate(documents):
                n_documents += 1
                for sentence, text in enumerate(sentences):
                    rows.append((number, sentence, text))
                    n_sentences += 1
                    characters += len(text)
                if characters >= GROUP_CHARACTERS:
                    flush()
                    characters = 0
            if rows:
                flush()
        if not n_sentences:
            raise TrainError("there is no text to split: not one document has a character")
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return SplitSummary(n_documents, n_sentences, Path(out).stat().st_size)


def is_split(names: Iterable[str]) -> bool:
    """Whether these are the columns of split text."""
    return set(COLUMNS) <= set(names)


def join_rows(rows: Iterable[dict[str, Any]], name: str) -> Iterator[tuple[str, ...]]:
    """The documents of split text as tuples of their sentences. `TrainError` naming a row that is out of order."""
    document, sentences = None, list[str]()
    for number, row in enumerate(rows, 1):
        text = row["text"]
        if row["document"] != document and sentences:
            yield tuple(sentences)
            sentences = []
        document = row["document"]
        if not isinstance(text, str) or row["sentence"] != len(sentences):
            found = f"sentence {row['sentence']} of document {document}"
            raise TrainError(
                f"row {number} of {name} is not usable: it is {found}, and sentence {len(sentences)} comes next",
                "write the file again with steer split",
            )
        sentences.append(text)
    if sentences:
        yield tuple(sentences)


def import_parquet(what: str) -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet, or a `TrainError` that says what needs them."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise TrainError(f"{what} needs pyarrow", "pip install 'steer[train]'") from error
    return pyarrow, parquet

"""`steer split`: text in, its sentences out, once, as Parquet."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steer.cli.options import Json, command, narrate, put
from steer.config import Settings
from steer.errors import SteerError

if TYPE_CHECKING:
    from collections.abc import Iterator

Sources = Annotated[
    list[str],
    typer.Argument(
        help="Text: .txt, .jsonl, .parquet, also .gz and .xz, folders of them, or hf:NAME[:CONFIG][:SPLIT].",
        metavar="FILE...",
    ),
]


@command()
def split(
    settings: Settings,
    files: Sources,
    out: Annotated[Path, typer.Option(help="The Parquet file to write.", metavar="TEXT.parquet")],
    language: Annotated[str, typer.Option(help="Whose rules end a sentence, as en or pt.", metavar="CODE")] = "en",
    max_documents: Annotated[int | None, typer.Option(help="Documents at most.", metavar="N")] = None,
    json: Json = False,
) -> None:
    """Split text into sentences once, as Parquet (document, sentence, text), which is itself read as text."""
    from train.sentences import write_split

    if out.suffix.lower() != ".parquet":
        raise SteerError(f"--out is `{out}`, and split text is Parquet", "give it a name that ends in .parquet")
    if out.exists():
        raise SteerError(f"`{out}` is there already", "remove it, or give another --out")
    if max_documents is not None and max_documents < 1:
        raise SteerError(f"--max-documents is {max_documents}", "give at least 1")
    summary = write_split(
        _documents(files, language, max_documents),
        out,
        lambda documents, sentences: narrate(f"split {documents:,} documents into {sentences:,} sentences"),
    )
    if json:
        put(asdict(summary))
    else:
        size = f"{summary.bytes / 1e6:,.1f} MB"
        print(f"{summary.documents:,} documents, {summary.sentences:,} sentences, {size} in {out}")


def _documents(files: list[str], language: str, most: int | None) -> Iterator[list[str]]:
    """The sentences of each document; several files are read side by side."""
    from itertools import islice

    from train.documents import list_sources, read_texts
    from train.sentences import split_sentences
    from train.text import interleave

    texts = interleave([read_texts(source) for source in list_sources(files)], len)
    return (split_sentences(text, language) for text in islice(texts, most))

"""Text files -> documents -> rows of token ids that fit a model's context.

A file is `.txt` (documents separated by a line `<|endoftext|>`, else one document), `.jsonl` (`text` or `messages` on
each line) or `.parquet` (columns of the same names); `.xz` and `.gz` around the first two are read as they are. Files
are streamed: nothing here holds more than one document of each. Several files are read side by side, each giving the
same number of tokens until it ends, so that the first tokens of a long list are a mixture and not its first file.
"""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llama_3.chat_format import ChatFormat, Message
from llama_3.tokenizer import Tokenizer
from train.errors import TrainError

SEPARATOR = "<|endoftext|>"
Document = str | list[Message]
"""Running text, or the messages of a dialog."""


@dataclass(frozen=True)
class Row:
    """One context of one document: BOS, then at most `context - 1` of its tokens."""

    document: int
    """number of the document in the whole reading, from 0"""
    offset: int
    """position in the document of `tokens[0]`"""
    tokens: list[int]


def read_documents(file: Path | str) -> Iterator[Document]:
    """The documents of one file in order. Raises `TrainError` naming the file, and the line of a bad JSON line."""
    path = Path(file)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in (".xz", ".gz") else ""
    kind = suffixes[-1] if suffixes else ""
    if not path.is_file():
        raise TrainError(f"there is no text file {path}")
    if kind not in (".txt", ".jsonl", ".parquet") or (kind == ".parquet" and packed):
        raise TrainError(f"{path} is no text file this program reads", "use .txt, .jsonl (also .xz, .gz) or .parquet")
    try:
        if kind == ".parquet":
            yield from _read_parquet(path)
            return
        with _open(path, packed) as lines:
            yield from _read_jsonl(path, lines) if kind == ".jsonl" else _read_txt(lines)
    except UnicodeDecodeError as error:
        raise TrainError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise TrainError(f"{path} is damaged: {error}", "copy or download it again") from error


def interleave(documents: Iterable[Iterator[list[int]]]) -> Iterator[list[int]]:
    """Token lists drawn from several sources, always from the one that has given the fewest tokens so far."""
    sources = list(documents)
    given = [0] * len(sources)
    live = set(range(len(sources)))
    while live:
        source = min(live, key=lambda i: (given[i], i))
        item = next(sources[source], None)
        if item is None:
            live.remove(source)
            continue
        given[source] += len(item)
        yield item


def default_chat(tokenizer: Tokenizer) -> ChatFormat | None:
    """How dialogs are written when nothing else is said: as in Llama 3; None for a vocabulary without its headers."""
    try:
        return ChatFormat(tokenizer)
    except ValueError:
        return None


def read_rows(
    files: Sequence[Path | str], tokenizer: Tokenizer, chat: ChatFormat | None, context: int
) -> Iterator[Row]:
    """The rows of all files. A document longer than `context` becomes several rows, each with BOS in front.

    Dialogs are written in the chat format, and are an error when `chat` is None.
    """
    assert context >= 2
    room = context - 1
    for number, tokens in enumerate(interleave([_encode_file(file, tokenizer, chat) for file in files])):
        for start in range(0, len(tokens), room):
            yield Row(number, start, [tokenizer.bos_id, *tokens[start : start + room]])


def _encode_file(file: Path | str, tokenizer: Tokenizer, chat: ChatFormat | None) -> Iterator[list[int]]:
    for document in read_documents(file):
        if isinstance(document, str):
            tokens = tokenizer.encode(document, bos=False)
        elif chat is None:
            raise TrainError(f"{file} holds dialogs, but this model has no chat format", "use running text")
        else:
            tokens = list(chat.encode_dialog(document)[0])
            tokens = tokens[1:] if tokens[:1] == [tokenizer.bos_id] else tokens
        if tokens:
            yield tokens


def _open(path: Path, packed: str) -> IO[str]:
    if packed == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if packed == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _read_txt(lines: Iterable[str]) -> Iterator[str]:
    document: list[str] = []
    for line in lines:
        if line.strip() == SEPARATOR:
            if text := "".join(document).strip():
                yield text
            document = []
        else:
            document.append(line)
    if text := "".join(document).strip():
        yield text


def _read_jsonl(path: Path, lines: Iterable[str]) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield _document(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise TrainError(f"line {number} of {path} is not usable: {error}") from error


def _document(entry: Any) -> Document:
    if not isinstance(entry, dict):
        raise ValueError("it is not a JSON object")
    if isinstance(text := entry.get("text"), str):
        return text
    messages = entry.get("messages")
    if not isinstance(messages, list):
        raise ValueError("it has neither `text` nor `messages`")
    dialog = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError("a message lacks `role` or `content` as text")
        dialog.append(Message(role, content))
    return dialog


def _read_parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise TrainError(
            f"reading {path} needs pyarrow", "pip install pyarrow, or convert the file to .jsonl"
        ) from error
    try:
        row = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            for entry in batch.to_pylist():
                row += 1
                try:
                    yield _document(entry)
                except ValueError as error:
                    raise TrainError(f"row {row} of {path} is not usable: {error}") from error
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise TrainError(f"{path} is damaged or not a parquet file ({error})") from error

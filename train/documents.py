"""Files, folders and datasets of text -> documents, one after the other.

A file is `.txt` (documents separated by a line `<|endoftext|>`, else one document), `.jsonl` (`text` or `messages` on
each line) or `.parquet` (columns of the same names, or split text: see `train/sentences.py`); `.xz` and `.gz` around
the first two are read as they are. A folder stands for all text files in it. `hf:NAME[@REVISION][:CONFIG][:SPLIT]` is a
Hugging Face dataset, or a local folder of one, read as a stream: nothing is downloaded ahead. Nothing here holds more
than one document of each source.
"""

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llama_3.chat_format import Message
from train.errors import TrainError
from train.sentences import import_parquet, is_split, join_rows

SEPARATOR = "<|endoftext|>"
HUB = "hf:"
Document = str | list[Message] | tuple[str, ...]
"""Running text, the messages of a dialog, or running text that is split into sentences already."""
_PACKED = (".xz", ".gz")
_KINDS = (".txt", ".jsonl", ".parquet")
_USE = "use .txt, .jsonl (also .xz, .gz) or .parquet"
_SPLIT_NAME = re.compile(r"(train|training|validation|valid|val|test|dev|eval)(_.*)?(\+.*)?")


def list_sources(files: Sequence[Path | str]) -> list[Path | str]:
    """`files` with each folder replaced by the text files in it and below it, sorted, hidden ones left out.

    A `hf:` source stays the string it is; everything else comes back as a Path. Raises `TrainError` for what is
    not there, what is no text, and a folder without any.
    """
    sources: list[Path | str] = []
    for file in files:
        path = Path(file)
        if str(file).startswith(HUB):
            sources.append(str(file))
        elif path.is_dir():
            inside = sorted(found for found in path.rglob("*") if not _hidden(found, path) and found.is_file())
            found = [entry for entry in inside if _is_text(entry)]
            if not found:
                raise TrainError(f"the folder {path} holds no text file", _USE)
            sources += found
        else:
            _kind(path)
            sources.append(path)
    return sources


def read_documents(source: Path | str) -> Iterator[Document]:
    """The documents of one file or `hf:` source in order.

    Raises `TrainError` naming the source, and the line or row that is not usable.
    """
    if str(source).startswith(HUB):
        yield from _read_hub(HubSource.parse(str(source)))
        return
    path = Path(source)
    kind, packed = _kind(path)
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
    except OSError as error:
        raise TrainError(f"{path} cannot be read: {error.strerror or error}") from error


def read_texts(source: Path | str) -> Iterator[str]:
    """The documents of a source that are not empty, each as one text. `TrainError` where it holds dialogs."""
    for document in read_documents(source):
        if isinstance(document, list):
            raise TrainError(f"{source} holds dialogs, which have no sentences of one text", "use running text")
        if text := "".join(document):
            yield text


@dataclass(frozen=True)
class HubSource:
    """What `hf:NAME[@REVISION][:CONFIG][:SPLIT]` names. One word after NAME is a split where it is called like one
    (train, validation, test, ...), else a configuration; `hf:NAME::SPLIT` says that it is a split."""

    name: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, source: str) -> "HubSource":
        """`TrainError` where there is no name or too many parts."""
        name, *rest = source.removeprefix(HUB).split(":")
        name, _, revision = name.partition("@")
        if not name or len(rest) > 2:
            raise TrainError(f"{source} names no dataset", "write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
        if len(rest) == 1 and _SPLIT_NAME.fullmatch(rest[0]):
            rest = ["", rest[0]]
        config, split = (*rest, "", "")[:2]
        return cls(name, revision or None, config or None, split or "train")


def _kind(path: Path) -> tuple[str, str]:
    """The suffix that says how a file is read, and that of what is around it, or "". `TrainError` for no text file."""
    if not path.is_file():
        raise TrainError(f"there is no text file {path}")
    if not _is_text(path):
        raise TrainError(f"{path} is no text file this program reads", _USE)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return (suffixes[-2], suffixes[-1]) if suffixes[-1] in _PACKED else (suffixes[-1], "")


def _is_text(path: Path) -> bool:
    *_, outer, last = ("", "", *(suffix.lower() for suffix in path.suffixes))
    return last in _KINDS or (last in _PACKED and outer in _KINDS[:2])


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


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


def _read_parquet(path: Path) -> Iterator[Document]:
    pyarrow, parquet = import_parquet(f"reading {path}")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in ("document", "sentence", "text", "messages") if name in names]
            batches = file.iter_batches(batch_size=256, columns=columns)
            entries = (entry for batch in batches for entry in batch.to_pylist())
            yield from join_rows(entries, str(path)) if is_split(names) else _read_entries(entries, str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise TrainError(f"{path} is damaged or not a parquet file ({error})") from error


def _read_hub(source: HubSource) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise TrainError(f"reading the dataset {source.name} needs datasets", "pip install 'steer[train]'") from error
    datasets.disable_progress_bars()
    name = f"the dataset {source.name}"
    try:
        entries = datasets.load_dataset(
            source.name, source.config, split=source.split, revision=source.revision, streaming=True
        )
        names = entries.column_names or ()
        yield from join_rows(entries, name) if is_split(names) else _read_entries(entries, name)
    except TrainError:
        raise
    except Exception as error:  # the hub, its network and a dozen file formats each raise their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TrainError(
            f"{name} cannot be read ({source.config or 'default'}, {source.split}): {reason}",
            "check the name, configuration and split, the network, and `hf auth login` for one that is gated",
        ) from error


def _read_entries(entries: Iterable[Any], name: str) -> Iterator[Document]:
    for row, entry in enumerate(entries, 1):
        try:
            yield _document(entry)
        except ValueError as error:
            raise TrainError(f"row {row} of {name} is not usable: {error}") from error


def _document(entry: Any) -> Document:
    if not isinstance(entry, dict):
        raise ValueError("it is not a JSON object")
    if isinstance(text := entry.get("text"), str):
        return _valid(text)
    messages = entry.get("messages")
    if not isinstance(messages, list):
        raise ValueError("it has neither `text` nor `messages`")
    dialog = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError("a message lacks `role` or `content` as text")
        dialog.append(Message(role, _valid(content)))
    return dialog


def _valid(text: str) -> str:
    """`text` with U+FFFD for halves of characters, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text

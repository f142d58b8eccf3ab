"""Text to token ids and back, whatever file the vocabulary comes in.

`load_tokenizer` finds the file and hands it to its reader: `tokenizer_tiktoken`, `tokenizer_json`,
`tokenizer_sentencepiece` or `tokenizer_gguf`. Special tokens have the names of the folder's `added_tokens` where it has
them, else Llama 3's.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from llama_3.config import ModelConfig, read_json
from llama_3.errors import config_error, explained
from llama_3.tokenizer_tiktoken import TiktokenTokenizer, read_ranks
from llama_3.vocabulary import N_SPECIALS, read_added_tokens, read_ends, special_names


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer."""

    bos_id: int
    eot_id: int
    """The token that ends a turn; the end of text where the vocabulary has no other."""
    stop_ids: tuple[int, ...]
    special_ids: frozenset[int]
    vocab_size: int
    """Ids this tokenizer knows, special ones included."""
    rows_needed: int
    """Rows an embedding needs for the ordinary tokens, `bos_id` and `eot_id`."""
    own_space: bool
    """Whether it puts a space of its own in front of a text, as Llama 2's does."""

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of `text`, in which special tokens are plain text; `bos` puts the first token in front."""

    def encode_after_special(self, text: str) -> list[int]:
        """The ids of a text that follows a special token, where some vocabularies put no space in front of it."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens by name, broken UTF-8 as U+FFFD."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token adds to a text; a special token's name."""

    def token_text(self, token: int) -> str:
        """One token for a person: its text, U+FFFD where it is part of a character; a special token's name."""

    def special(self, name: str) -> int:
        """The id of a special token such as `<|eot_id|>`; ValueError when there is none."""


class StreamDecoder:
    """Text of tokens as they come; a character split over tokens appears with its last byte.

    With `opens` the tokens begin a text, so that a space which the tokenizer put in front of it is left out.
    """

    def __init__(self, tokenizer: Tokenizer, *, opens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._own_space = opens and tokenizer.own_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, "" while a character is incomplete."""
        piece = self._tokenizer.token_bytes(token)
        if self._own_space:
            piece, self._own_space = piece.removeprefix(b" "), False
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character, else ""."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a model folder, of Meta's folder with its `original/`, or of a GGUF file.

    Where a folder has several files, `tokenizer.model` in tiktoken's form comes first (it is what Llama 3 was trained
    with), then `tokenizer.json`, which transformers too prefers to a sentencepiece `tokenizer.model`: a fine-tune that
    adds tokens writes them there. OSError or ValueError in one sentence.
    """
    path = Path(path)
    folders = model_folders(path)
    model = next((file for folder in folders if (file := folder / "tokenizer.model").is_file()), None)
    raw = model.read_bytes() if model else b""
    ends = read_ends(folders)
    if model and not _is_sentencepiece(raw):
        ranks = read_ranks(raw, model)
        return TiktokenTokenizer(ranks, _specials(folders, len(ranks)), str(model), **ends)
    described = next((file for folder in folders if (file := folder / "tokenizer.json").is_file()), None)
    if described:
        from llama_3.tokenizer_json import read_tokenizer_json

        return read_tokenizer_json(read_json(described) or {}, str(described), **ends)
    if model:
        from llama_3.tokenizer_sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(raw, str(model), read_added_tokens(folders), **ends)
    metadata = gguf_metadata(path)
    if metadata is not None:
        from llama_3.tokenizer_gguf import read_gguf_vocabulary

        return read_gguf_vocabulary(metadata, str(path))
    hint = "copy tokenizer.model (in Meta's download: original/tokenizer.model) into the folder"
    raise explained(FileNotFoundError, f"there is no tokenizer.model or tokenizer.json in {path}", hint)


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """ValueError where text becomes ids that the model has no row for: the tokenizer is another model's.

    More rows than tokens are fine. So are added tokens beyond the rows, special or not, which some published
    checkpoints list and never use; but for the one that begins a text and the one that ends a turn.
    """
    if tokenizer.rows_needed > config.vocab_size:
        raise config_error(
            f"the tokenizer's ids go up to {tokenizer.rows_needed - 1:,} and the model's to {config.vocab_size - 1:,}",
            "use the tokenizer that the model was published with",
        )


def model_folders(path: Path) -> list[Path]:
    """Where a model's small files lie: its folder, then the `original/` inside; none for a single GGUF file."""
    return [path, path / "original"] if path.suffix.lower() != ".gguf" or path.is_dir() else []


def gguf_metadata(path: Path) -> dict[str, Any] | None:
    """The metadata of the GGUF file at `path` or in it; None where there is none."""
    from llama_3.gguf_file import find_gguf, read_metadata  # brings torch, which no other tokenizer needs

    file = find_gguf(path)
    return None if file is None else read_metadata(file)


def _is_sentencepiece(raw: bytes) -> bool:
    # Field 1 of a protobuf message against a base64 character; neither begins with the other's first byte.
    return raw[:1] == b"\x0a"


def _specials(folders: Sequence[Path], first: int) -> dict[str, int]:
    if specials := {name: token for name, token in read_added_tokens(folders).items() if token >= first}:
        return specials
    sizes = (size for folder in folders for name in ("config.json", "params.json") if (size := _size(folder / name)))
    count = next(sizes, first + N_SPECIALS) - first
    return {name: first + offset for offset, name in enumerate(special_names()[: max(0, min(N_SPECIALS, count))])}


def _size(path: Path) -> int:
    size = (read_json(path) or {}).get("vocab_size", 0)
    if not isinstance(size, int):
        raise config_error(f"{path} has vocab_size {size!r}, which is no whole number")
    return max(size, 0)

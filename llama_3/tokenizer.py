"""Text to token ids and back: Llama 3's tiktoken vocabulary behind a small interface.

Ids below the number of ranks are byte strings; the special tokens follow, named by the folder's `added_tokens` where it
has them, else in Llama 3's order. Special tokens written in a user's text stay plain text: only `special` and the chat
format emit them.
"""

import base64
import binascii
import codecs
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import tiktoken

from llama_3.config import config_error, read_json

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts text before byte-pair merging (Meta's llama-models, tokenizer.py)."""

_N_SPECIALS = 256


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer."""

    bos_id: int
    eot_id: int
    """The token that ends a turn."""
    stop_ids: tuple[int, ...]
    special_ids: frozenset[int]
    vocab_size: int
    """Ids this tokenizer knows, special ones included."""

    @property
    def n_vocab(self) -> int:
        """The same as `vocab_size`, under tiktoken's name."""

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of `text`, in which special tokens are plain text; `bos` puts the first token in front."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens by name, broken UTF-8 as U+FFFD."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; a special token's name."""

    def token_text(self, token: int) -> str:
        """One token for a person: its text, U+FFFD where it is part of a character; a special token's name."""

    def special(self, name: str) -> int:
        """The id of a special token such as `<|eot_id|>`; ValueError when there is none."""


class TiktokenTokenizer:
    """A `Tokenizer` over byte ranks and named special tokens."""

    def __init__(self, ranks: dict[bytes, int], specials: dict[str, int]) -> None:
        self._specials = dict(specials)
        self._names = {token: name for name, token in specials.items()}
        self._bytes = {rank: piece for piece, rank in ranks.items()}
        self._encoding = tiktoken.Encoding(
            "llama3", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self._specials
        )
        self.vocab_size = len(ranks) + len(specials)
        self.special_ids = frozenset(specials.values())
        self.bos_id = self.special("<|begin_of_text|>")
        self.eot_id = self.special("<|eot_id|>")
        stops = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
        self.stop_ids = tuple(specials[name] for name in stops if name in specials)

    @property
    def n_vocab(self) -> int:
        return self.vocab_size

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        tokens = self._encoding.encode_ordinary(text)
        return [self.bos_id, *tokens] if bos else tokens

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        piece = self._bytes.get(token)
        # Models may have more rows than their tokenizer has tokens: such an id is shown as a number.
        return self._names.get(token, f"<|{token}|>").encode() if piece is None else piece

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode("utf-8", errors="replace")

    def special(self, name: str) -> int:
        if name not in self._specials:
            raise ValueError(f"this tokenizer has no special token {name}")
        return self._specials[name]


class StreamDecoder:
    """Text of tokens as they come; a character split over tokens appears with its last byte."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, "" while a character is incomplete."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character, else ""."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a model folder (`tokenizer.model` in tiktoken's form); OSError or ValueError in one sentence."""
    folder = Path(folder)
    path = folder / "tokenizer.model"
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        error = FileNotFoundError(f"there is no tokenizer.model in {folder}")
        error.hint = "copy tokenizer.model (in Meta's download: original/tokenizer.model) into the folder"  # type: ignore[attr-defined]
        raise error from None
    if raw[:1] == b"\x0a":
        raise config_error(f"{path} is a sentencepiece tokenizer, and only Llama 3's tiktoken form is supported")
    ranks = _read_ranks(raw, path)
    return TiktokenTokenizer(ranks, _read_specials(folder, len(ranks)))


def _read_ranks(raw: bytes, path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise config_error(f"{path} line {number} is not a base64 token and its rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise config_error(f"{path} does not hold ranks 0 to N-1 with every single byte among them")
    return ranks


def _read_specials(folder: Path, first: int) -> dict[str, int]:
    added: list[dict[str, Any]] = []
    decoder = (read_json(folder / "tokenizer_config.json") or {}).get("added_tokens_decoder")
    try:
        if decoder:
            added = [{"id": token, **entry} for token, entry in decoder.items()]
        else:
            added = (read_json(folder / "tokenizer.json") or {}).get("added_tokens") or []
        specials = {str(entry["content"]): int(entry["id"]) for entry in added if int(entry["id"]) >= first}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        name = "tokenizer_config.json" if decoder else "tokenizer.json"
        raise config_error(f"{folder / name} does not list its added tokens by id and content ({error})") from error
    if specials:
        return specials
    vocab_size = (read_json(folder / "config.json") or {}).get("vocab_size", first + _N_SPECIALS)
    names = special_names()[: max(0, min(_N_SPECIALS, int(vocab_size) - first))]
    return {name: first + offset for offset, name in enumerate(names)}


def special_names() -> list[str]:
    """The 256 special tokens of Llama 3.1 and later, in the order of their ids."""
    named = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id"}
    named |= {7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
    reserved = (f"reserved_special_token_{i}" for i in range(_N_SPECIALS))
    return [f"<|{named.get(offset) or next(reserved)}|>" for offset in range(_N_SPECIALS)]

"""What all tokenizers share: ids as byte strings, special tokens by name, and how ids become text again.

A tokenizer of a given file form (`tokenizer_tiktoken`, `tokenizer_json`, `tokenizer_sentencepiece`) is a `Vocabulary`
that knows how to cut text. Special tokens written in a user's text stay plain text: only `special` and the chat format
emit them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama_3.config import read_json
from llama_3.errors import config_error

N_SPECIALS = 256
"""Special tokens of a full Llama 3 vocabulary."""

Prefix = Literal["none", "first", "every"]
"""Where the tokenizer itself puts a space in front of text: nowhere, at the very start, after every special token."""

_BOS = ("<|begin_of_text|>", "<s>")
_EOS = ("<|end_of_text|>", "</s>", "<|endoftext|>")
_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>", "</s>", "<|endoftext|>")


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens by name, and which of them begin a text, end a turn, and stop a reply."""

    ids: dict[str, int]
    bos: int
    eot: int
    stops: tuple[int, ...]

    @classmethod
    def choose(cls, ids: Mapping[str, int], where: str, bos: str | None, eos: str | None) -> "SpecialTokens":
        """Picks by the names a checkpoint declares, else by the names Llama models use; ValueError where none fits.

        A vocabulary without `<|eot_id|>` ends its turns with the end of text, and one without a first token of its own
        begins with that too (GPT-2's kind).
        """
        for name in ids:
            if name != _valid(name):
                raise config_error(f"{where} has a special token {name!r}, which is no text")
        end = next((ids[name] for name in (eos or "", *_EOS) if name in ids), None)
        begin = next((ids[name] for name in (bos or "", *_BOS) if name in ids), end)
        if begin is None:
            raise config_error(f"{where} names no token that begins a text (<|begin_of_text|> or <s>)")
        turn = ids.get("<|eot_id|>", end)
        if turn is None:
            raise config_error(f"{where} names no token that ends a turn (<|eot_id|> or </s>)")
        stops = [ids[name] for name in _STOPS if name in ids]
        return cls(dict(ids), begin, turn, tuple(dict.fromkeys([*stops, turn, *([] if end is None else [end])])))


class Vocabulary(ABC):
    """A `Tokenizer` but for the cutting of text.

    `pieces` are the bytes that each id of the model's own vocabulary adds to a text, `added` those of tokens that a
    file puts beside it and that are found whole in a text.
    """

    def __init__(
        self,
        pieces: Mapping[int, bytes],
        specials: SpecialTokens,
        prefix: Prefix = "none",
        added: Mapping[int, bytes] | None = None,
    ) -> None:
        self._specials = specials
        self._prefix, self.own_space = prefix, prefix != "none"
        names = {token: name.encode() for name, token in specials.ids.items()}
        self._bytes = {**pieces, **(added or {}), **names}
        self.vocab_size = len(self._bytes)
        self.rows_needed = 1 + max(specials.bos, specials.eot, *(pieces.keys() - names.keys()))
        self.special_ids = frozenset(names)
        self.bos_id, self.eot_id, self.stop_ids = specials.bos, specials.eot, specials.stops

    @abstractmethod
    def _cut(self, text: str, after_special: bool) -> list[int]:
        """Token ids of `text`, no special tokens among them."""

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        tokens = self._cut(_valid(text), after_special=False)
        return [self.bos_id, *tokens] if bos else tokens

    def encode_after_special(self, text: str) -> list[int]:
        return self._cut(_valid(text), after_special=True)

    def decode(self, ids: Iterable[int]) -> str:
        text = bytearray()
        fresh = self.own_space
        for token in ids:
            piece = self.token_bytes(token)
            if token in self.special_ids:
                fresh = fresh or self._prefix == "every"
            elif fresh:
                piece, fresh = piece.removeprefix(b" "), False
            text += piece
        return text.decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        # Models may have more rows than their tokenizer has tokens: such an id is shown as a number.
        return self._bytes.get(token) or f"<|{token}|>".encode()

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode("utf-8", errors="replace")

    def special(self, name: str) -> int:
        if name not in self._specials.ids:
            raise ValueError(f"this tokenizer has no special token {name}")
        return self._specials.ids[name]


def read_ends(folders: Iterable[Path]) -> dict[str, str | None]:
    """The names of the tokens that begin and end a text, as `bos` and `eos`, where `tokenizer_config.json` has them."""
    settings = next((found for folder in folders if (found := read_json(folder / "tokenizer_config.json"))), {})
    return {key: _token_name(settings.get(f"{key}_token")) for key in ("bos", "eos")}


def read_added_tokens(folders: Iterable[Path]) -> dict[str, int]:
    """The added tokens of `tokenizer_config.json`, else of `tokenizer.json`; ValueError where they cannot be read."""
    files = (folder / name for folder in folders for name in ("tokenizer_config.json", "tokenizer.json"))
    return next((found for file in files if (found := _added_tokens(file))), {})


def _token_name(entry: Any) -> str | None:
    """The spelling of a token that a configuration gives as text or as an object with `content`."""
    name = entry.get("content") if isinstance(entry, dict) else entry
    return name if isinstance(name, str) else None


def _added_tokens(path: Path) -> dict[str, int]:
    raw = read_json(path) or {}
    try:
        if decoder := raw.get("added_tokens_decoder"):
            return {str(entry["content"]): _id(token) for token, entry in decoder.items()}
        return {str(entry["content"]): _id(entry["id"]) for entry in raw.get("added_tokens") or []}
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise config_error(f"{path} does not list its added tokens by id and content ({error})") from error


def _id(value: Any) -> int:
    if not 0 <= int(value) < 2**31:
        raise ValueError(f"{value} is no id")
    return int(value)


def special_names() -> list[str]:
    """The 256 special tokens of Llama 3.1 and later, in the order of their ids."""
    named = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id"}
    named |= {7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
    reserved = (f"reserved_special_token_{i}" for i in range(N_SPECIALS))
    return [f"<|{named.get(offset) or next(reserved)}|>" for offset in range(N_SPECIALS)]


def byte_letters() -> dict[str, int]:
    """GPT-2's printable letter of each byte, as the byte of each letter."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _valid(text: str) -> str:
    """`text` with halves of surrogate pairs, which no tokenizer can take, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text

"""`tokenizer.json`: Llama 3's shape becomes ranks for tiktoken, any other goes through the `tokenizers` library.

The shape is recognised by everything that decides about ids: the split, no normalizer, whole words first, merges in
the order of the ranks and none left out, only special tokens added. A file that differs in one of them is cut by the
library that defines the format, so that ids are exact either way. Of Llama 2's kind the file's own rule for spaces is
followed, which agrees with sentencepiece and Meta's code; transformers 5 replaces it when it loads such a file.
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from llama_3.config import described
from llama_3.errors import config_error
from llama_3.tokenizer_tiktoken import SPLIT_PATTERN, TiktokenTokenizer, complete
from llama_3.vocabulary import Prefix, SpecialTokens, Vocabulary, byte_letters

_SPACE = "\u2581"
_LETTERS = byte_letters()


class JsonTokenizer(Vocabulary):
    """A `Tokenizer` over the `tokenizers` library: byte-level, or with U+2581 for the space (Llama 2's kind)."""

    def __init__(self, raw: dict[str, Any], where: str, *, bos: str | None = None, eos: str | None = None) -> None:
        raw = raw | {"truncation": None, "padding": None, "post_processor": None}
        byte_level, prefix = _spelling(raw, where)
        try:
            names = {token["content"]: int(token["id"]) for token in raw.get("added_tokens") or []}
            begin_or_end = {"<unk>", bos, eos}
            is_special = {t["content"] for t in raw.get("added_tokens") or [] if t.get("special")}
            special = {name: token for name, token in names.items() if name in is_special | begin_or_end}
            # `encode_special_tokens` leaves alone what the file merely forgot to mark as special.
            raw["added_tokens"] = [t | {"special": t["content"] in special} for t in raw.get("added_tokens") or []]
            self._fast = _build(raw)
            self._fast_inside = _build(_without_prefix(raw)) if prefix == "first" else self._fast
        except BaseException as error:  # the library's panics are BaseExceptions
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise config_error(f"{where} is not a tokenizer that can be used: {error}") from error
        # An added token is text as it stands, also where the model's own table lists it.
        vocab = self._fast.get_vocab(with_added_tokens=False).items()
        pieces = {token: _spelled(piece, byte_level, where) for piece, token in vocab if piece not in names}
        added = {token: name.encode() for name, token in names.items()}
        super().__init__(pieces, SpecialTokens.choose(special, where, bos, eos), prefix, added)

    def _cut(self, text: str, after_special: bool) -> list[int]:
        fast = self._fast_inside if after_special else self._fast
        ids: list[int] = fast.encode(text, add_special_tokens=False).ids
        return ids


def read_tokenizer_json(
    raw: dict[str, Any], where: str, *, bos: str | None = None, eos: str | None = None
) -> TiktokenTokenizer | JsonTokenizer:
    """The tokenizer of a parsed `tokenizer.json`, called `where` in errors; ValueError for a kind no Llama uses."""
    model = raw.get("model")
    kind = (model.get("type") or ("BPE" if "merges" in model else None)) if isinstance(model, dict) else None
    if kind not in ("BPE", "Unigram"):
        raise config_error(f"{where} is a tokenizer of type {kind}, and only BPE and Unigram are supported")
    if ranks := _llama_3_ranks(raw):
        specials = {token["content"]: int(token["id"]) for token in raw["added_tokens"]}
        return TiktokenTokenizer(ranks, specials, where, bos=bos, eos=eos)
    return JsonTokenizer(raw, where, bos=bos, eos=eos)


def _llama_3_ranks(raw: dict[str, Any]) -> dict[bytes, int] | None:
    """Bytes to ranks where the file has Llama 3's shape in every respect, else None."""
    try:
        model, added = raw["model"], raw["added_tokens"]
        split, byte_level = raw["pre_tokenizer"]["pretokenizers"]
        if not (
            model["ignore_merges"] is True
            and not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
            and raw.get("normalizer") is None
            and (split["type"], split["behavior"], split["invert"]) == ("Split", "Isolated", False)
            and split["pattern"] == {"Regex": SPLIT_PATTERN}
            and byte_level["type"] == "ByteLevel"
            and not byte_level["add_prefix_space"]
            and byte_level["use_regex"] is False
            and all(token["special"] is True and isinstance(token["content"], str) for token in added)
            and all(0 <= token["id"] < 2**31 for token in added)
        ):
            return None
        names = {token["content"]: int(token["id"]) for token in added}
        vocab = {piece: int(rank) for piece, rank in model["vocab"].items() if piece not in names}
        merged = [vocab["".join(merge.split(" ") if isinstance(merge, str) else merge)] for merge in model["merges"]]
        ranks = {_bytes_of_letters(piece): rank for piece, rank in vocab.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    # Ranks stand for the merges only if these come in the order of the ranks, and every pair that could merge may.
    agree = merged == sorted(merged) and len(merged) == _count_pairs(vocab) and complete(ranks)
    return ranks if agree and len(ranks) <= min(names.values(), default=0) else None


def _count_pairs(vocab: Mapping[str, int]) -> int:
    """In how many ways the pieces are two pieces put together."""
    return sum(piece[:cut] in vocab and piece[cut:] in vocab for piece in vocab for cut in range(1, len(piece)))


def _spelling(raw: dict[str, Any], where: str) -> tuple[bool, Prefix]:
    """Whether pieces are spelled in GPT-2's byte letters, and where the file itself puts a space."""
    normalizers = _steps(raw.get("normalizer"), "normalizers")
    steps = [*_steps(raw.get("pre_tokenizer"), "pretokenizers"), *_steps(raw.get("decoder"), "decoders")]
    if any(step.get("type") == "ByteLevel" for step in steps):
        return True, "none"
    metaspace = next((step for step in steps if step.get("type") == "Metaspace"), None)
    if any(step.get("type") == "Prepend" for step in normalizers):
        return False, "every"
    if metaspace is not None:
        scheme = metaspace.get("prepend_scheme") or ("always" if metaspace.get("add_prefix_space", True) else "never")
        schemes: dict[str, Prefix] = {"always": "every", "first": "first"}
        return False, schemes.get(scheme, "none")
    if any(step.get("type") == "Replace" and step.get("content") == _SPACE for step in normalizers):
        return False, "none"
    raise config_error(f"{where} spells its tokens neither in bytes nor with U+2581 for a space")


def _steps(step: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(step, dict):
        return []
    inner = step.get(key)
    return [step] if not isinstance(inner, list) else [one for part in inner for one in _steps(part, key)]


def _without_prefix(raw: dict[str, Any]) -> dict[str, Any]:
    raw = json.loads(json.dumps(raw))
    for step in _steps(raw["pre_tokenizer"], "pretokenizers"):
        if step.get("type") == "Metaspace":
            step["prepend_scheme"] = "never"
    return raw


def _build(raw: dict[str, Any]) -> FastTokenizer:
    fast = FastTokenizer.from_str(json.dumps(raw))
    fast.encode_special_tokens = True  # typed in a text they are text
    return fast


def _spelled(piece: str, byte_level: bool, where: str) -> bytes:
    try:
        return _bytes_of_letters(piece) if byte_level else _bytes_of_piece(piece)
    except (KeyError, ValueError) as error:
        raise config_error(f"{where} has a token {described(piece)} that spells no bytes") from error


def _bytes_of_letters(piece: str) -> bytes:
    return bytes([_LETTERS[letter] for letter in piece])


def _bytes_of_piece(piece: str) -> bytes:
    """A piece of sentencepiece's kind: U+2581 is a space, `<0x41>` the byte of that number."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPACE, " ").encode()

"""The tokenizer of a GGUF file: its lists of tokens become the form that the model was published with.

`tokenizer.ggml.model` names the kind ("gpt2": byte-level, "llama": sentencepiece) and `tokenizer.ggml.pre` how a
byte-level one cuts words (names: llama.cpp, llama-vocab.cpp). Only cuts that are known exactly are accepted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llama_3.errors import config_error
from llama_3.tokenizer_json import JsonTokenizer
from llama_3.tokenizer_sentencepiece import CONTROL, UNKNOWN, USER_DEFINED, SentencePieceTokenizer, model_proto
from llama_3.tokenizer_tiktoken import SPLIT_PATTERN, TiktokenTokenizer, complete
from llama_3.vocabulary import byte_letters

_BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT_2 = _BYTES_ONLY | {"use_regex": True}
_LLAMA_3 = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
_LLAMA_3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_CUTS: dict[str, list[dict[str, Any]]] = {
    **{name: [_LLAMA_3, _BYTES_ONLY] for name in _LLAMA_3_NAMES},
    "gpt-2": [_GPT_2],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT_2],
}


def read_gguf_vocabulary(
    metadata: Mapping[str, Any], where: str
) -> TiktokenTokenizer | JsonTokenizer | SentencePieceTokenizer:
    """The tokenizer that a GGUF file's metadata describes, called `where` in errors; ValueError where it cannot be."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise config_error(f"{where} has a tokenizer of kind {kind!r}, and only 'gpt2' and 'llama' are supported")
    tokens, types = _list(metadata, "tokens", where, str), _list(metadata, "token_type", where, int)
    if len(types) != len(tokens):
        raise config_error(f"{where} lists {len(tokens)} tokens but {len(types)} token types")
    names = {
        key: tokens[token]
        for key in ("bos", "eos")
        if isinstance(token := metadata.get(f"tokenizer.ggml.{key}_token_id"), int) and 0 <= token < len(tokens)
    }
    if kind == "llama":
        scores = _list(metadata, "scores", where, float)
        if len(scores) != len(tokens):
            raise config_error(f"{where} lists {len(tokens)} tokens but {len(scores)} scores")
        spaces = {
            "dummy_prefix": bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
            "remove_extra_whitespaces": bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)),
        }
        try:
            proto = model_proto(tokens, scores, types, **spaces)
        except (ValueError, OverflowError) as error:
            raise config_error(f"{where} has a token, score or type that cannot be used: {error}") from error
        return SentencePieceTokenizer(proto, where, **names)
    return _byte_level(metadata, where, tokens, types, names)


def _byte_level(
    metadata: Mapping[str, Any], where: str, tokens: Sequence[str], types: Sequence[int], names: Mapping[str, str]
) -> TiktokenTokenizer | JsonTokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in _CUTS:
        known = ", ".join(_CUTS)
        raise config_error(f"{where} cuts words the way {pre!r} does, and only {known} are supported")
    specials = {tokens[i]: i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)}
    in_text = {tokens[i]: i for i, kind in enumerate(types) if kind == USER_DEFINED}
    vocab = {piece: i for i, piece in enumerate(tokens) if piece not in specials and piece not in in_text}
    if pre in _LLAMA_3_NAMES and not in_text:
        letters = byte_letters()
        try:
            ranks = {bytes([letters[letter] for letter in piece]): rank for piece, rank in vocab.items()}
        except KeyError as error:
            raise config_error(f"{where} has a token with {error}, which is no byte's letter") from error
        if not complete(ranks):
            raise config_error(f"{where} does not hold ranks 0 to N-1 with every single byte among them")
        return TiktokenTokenizer(ranks, specials, where, **names)
    added = [
        {"id": i, "content": name, "special": name in specials, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for name, i in sorted({**specials, **in_text}.items(), key=lambda item: item[1])
    ]
    raw: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _CUTS[pre]},
        "decoder": _GPT_2,
        "model": {
            "type": "BPE",
            "vocab": vocab | specials | in_text,
            "merges": [merge.split(" ", 1) for merge in _list(metadata, "merges", where, str)],
            "ignore_merges": pre in _LLAMA_3_NAMES,
        },
    }
    return JsonTokenizer(raw, where, **names)


def _list(metadata: Mapping[str, Any], key: str, where: str, kind: type) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    accepted = (int, float) if kind is float else kind
    if not isinstance(values, list) or not values or not all(isinstance(value, accepted) for value in values):
        raise config_error(f"{where} lacks the list tokenizer.ggml.{key}")
    return values

"""Sentencepiece vocabularies (Llama 2, TinyLlama), from `tokenizer.model` or from the lists in a GGUF file.

Text is cut by the `sentencepiece` library. It puts a space in front of every text it is given, so each stretch between
special tokens begins with one, as in Meta's code for Llama 2; decoding takes it away again.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence

import sentencepiece

from llama_3.errors import config_error
from llama_3.vocabulary import SpecialTokens, Vocabulary

_SPACE = "\u2581"
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
"""Types of pieces (sentencepiece_model.proto; GGUF counts alike). 1 is an ordinary piece, 5 an unused one."""


class SentencePieceTokenizer(Vocabulary):
    """A `Tokenizer` over a serialised sentencepiece model, called `where` in errors."""

    def __init__(
        self,
        model: bytes,
        where: str,
        added: Mapping[str, int] | None = None,
        *,
        bos: str | None = None,
        eos: str | None = None,
    ) -> None:
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            if not model or not self._model.LoadFromSerializedProto(model):
                raise RuntimeError("it is empty")
            pieces = [self._model.id_to_piece(token) for token in range(self._model.get_piece_size())]
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise config_error(f"{where} is not a sentencepiece model that can be used: {reason}") from error
        names = {
            piece: token
            for token, piece in enumerate(pieces)
            if self._model.is_control(token) or self._model.is_unknown(token)
        }
        # Tokens that a fine-tune added lie behind the model's own, which cannot produce them from text.
        names |= {name: token for name, token in (added or {}).items() if token >= len(pieces)}
        spelled = {
            token: bytes([int(piece[3:5], 16)]) if self._model.is_byte(token) else piece.replace(_SPACE, " ").encode()
            for token, piece in enumerate(pieces)
        }
        has_prefix = "".join(self._model.encode("a", out_type=str)).startswith(_SPACE)
        super().__init__(spelled, SpecialTokens.choose(names, where, bos, eos), "every" if has_prefix else "none")

    def _cut(self, text: str, after_special: bool) -> list[int]:
        ids: list[int] = self._model.encode(text, out_type=int)
        return ids


def model_proto(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    dummy_prefix: bool = True,
    remove_extra_whitespaces: bool = False,
) -> bytes:
    """A serialised sentencepiece BPE model of these pieces (field numbers: sentencepiece_model.proto)."""
    entries = (
        _field(1, piece.encode()) + _tag(2, 5) + struct.pack("<f", score) + _number(3, kind)
        for piece, score, kind in zip(pieces, scores, types, strict=True)
    )
    bpe, unknown = 2, next((token for token, kind in enumerate(types) if kind == UNKNOWN), 0)
    trainer = _number(3, bpe) + _number(35, BYTE in types) + _number(40, unknown)
    normalizer = (
        _field(1, b"identity") + _number(3, dummy_prefix) + _number(4, remove_extra_whitespaces) + _number(5, 1)
    )
    return b"".join(_field(1, entry) for entry in entries) + _field(2, trainer) + _field(3, normalizer)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _number(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(int(value))


def _field(field: int, content: bytes | Iterable[int]) -> bytes:
    content = bytes(content)
    return _tag(field, 2) + _varint(len(content)) + content

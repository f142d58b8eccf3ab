"""Small vocabularies trained here, written in every form a tokenizer comes in, and strings to compare them on."""

import base64
import colorsys
import difflib
import fractions
import inspect
import io
import json
import random
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.tokenization_utils_base import generate_merges

from llama_3.tokenizer_tiktoken import SPLIT_PATTERN
from llama_3.vocabulary import byte_letters, special_names

EMOJI = ["🦙", "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "👍🏽", "🇩🇪", "❤️", "1️⃣"]
SPACES = [" ", "  ", "\t", "\n", "\n\n", "\r\n", "\r", "\x0b", "\x1c", "\x85", "\u00a0", "\u2028", "\u3000", "\u200b"]
WORDS = [
    "Zoë",
    "naïve",
    "你好世界",
    "Việt",
    "e\u0301",
    "привет",
    "שלום",
    "हिन्दी",
    "I'LL",
    "it's",
    "12345",
    "x_1",
    "\u017f",
    "\u212a",
    "…",
]


def code() -> list[str]:
    """Source text that does not change with this project: prose in docstrings, and Python."""
    return [inspect.getsource(module) for module in (textwrap, difflib, colorsys, fractions)]


def corpus() -> list[str]:
    """Lines of prose, code and other scripts for training, always the same."""
    lines = [line for text in code() for line in text.splitlines(keepends=True)]
    return [*lines[:1000], *(f"{a} {b}{space}" for a in WORDS for b in EMOJI + WORDS[:6] for space in SPACES[:6])]


def byte_level(texts: Iterable[str], size: int, cut: Sequence[Any], *, whole_words: bool = True) -> FastTokenizer:
    """A byte-level BPE of `size` tokens trained on `texts`, whose words `cut` makes; Llama 3's takes `whole_words`."""
    fast = FastTokenizer(BPE(ignore_merges=whole_words))
    fast.pre_tokenizer = pre_tokenizers.Sequence(list(cut))
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer
    fast.train_from_iterator(texts, trainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    return fast


def llama_3_cut() -> list[Any]:
    """How Llama 3's `tokenizer.json` makes words."""
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"), bytes_only]


def ranks_of(fast: FastTokenizer) -> dict[bytes, int]:
    """The vocabulary of a byte-level tokenizer as tiktoken has it."""
    letters = byte_letters()
    return {bytes(letters[letter] for letter in piece): rank for piece, rank in fast.get_vocab().items()}


def write_ranks(folder: Path, ranks: dict[bytes, int]) -> Path:
    """`tokenizer.model` in tiktoken's form."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (base64.b64encode(piece) + b" %d\n" % rank for piece, rank in sorted(ranks.items(), key=lambda i: i[1]))
    file = folder / "tokenizer.model"
    file.write_bytes(b"".join(lines))
    return file


def write_llama_3_json(folder: Path, model: Path, template: str | None = None) -> None:
    """`tokenizer.json` and `tokenizer_config.json` as transformers makes them from a `tokenizer.model`."""
    folder.mkdir(parents=True, exist_ok=True)
    TikTokenConverter(str(model), extra_special_tokens=special_names()).converted().save(str(folder / "tokenizer.json"))
    write_config(folder, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=template)


def write_config(folder: Path, **entries: Any) -> None:
    """`tokenizer_config.json` with the entries that are not None."""
    kept = {key: value for key, value in entries.items() if value is not None}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **kept}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def transformers_of(folder: Path) -> Any:
    """What transformers makes of a folder with `tokenizer.json`."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


def gguf_lists(tokens: Sequence[str], types: Sequence[int], bos: int, eos: int, **more: Any) -> dict[str, Any]:
    """The metadata of a GGUF file as far as it is about the tokenizer."""
    entries = {"tokens": list(tokens), "token_type": list(types), "bos_token_id": bos, "eos_token_id": eos, **more}
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items()}


def train_sentencepiece(size: int = 900) -> sentencepiece.SentencePieceProcessor:
    """A BPE with the settings of Llama 2's: bytes for what is unknown, spaces kept, digits apart."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.strip("\n") for line in corpus()), model_writer=out, vocab_size=size,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, allow_whitespace_only_pieces=True, hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def write_llama_2_json(folder: Path, model: sentencepiece.SentencePieceProcessor, template: str | None = None) -> None:
    """`tokenizer.json` of Llama 2's shape with the pieces of a sentencepiece model."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [model.id_to_piece(token) for token in range(model.get_piece_size())]
    scores = {piece: model.get_score(token) for token, piece in enumerate(pieces)}
    vocab, names = {piece: token for token, piece in enumerate(pieces)}, ("<unk>", "<s>", "</s>")
    fast = FastTokenizer(
        BPE(vocab, generate_merges(vocab, scores, names), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(undo)
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    fast.save(str(folder / "tokenizer.json"))
    write_config(folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template)


def strings(count: int = 10_000) -> list[str]:
    """At least `count` different texts: code, prose, scripts, spaces, emoji, special tokens written out, anything."""
    rng = random.Random(7)
    found = dict.fromkeys(hypothesis_texts(1500))
    names = [*special_names(), "<s>", "</s>", "<unk>", "<0x0A>", "▁", "<|im_start|>", "<|eot_id", "[INST]"]
    found |= dict.fromkeys([*names, *(f"a{name} b" for name in names), *(f"{name}\n{name}" for name in names)])
    sources = code()
    found |= dict.fromkeys(line for text in sources for line in text.splitlines(keepends=True))
    everywhere = [chr(i) for i in range(0x20, 0x3000, 7)] + [chr(i) for i in range(0x3000, 0x110000, 997)]
    letters = [letter for letter in everywhere if not 0xD800 <= ord(letter) < 0xE000]
    kinds = [
        SPACES,
        EMOJI,
        WORDS,
        letters,
        list("aeiou tns'.,!?-_/\\(){}0123456789"),
        names,
        ["ab", "xyz", "the", "The"],
    ]
    while len(found) < count:
        mixed = rng.choices(kinds, k=rng.randint(1, 4))
        parts = [rng.choice(rng.choice(mixed)) for _ in range(rng.randint(1, 14))]
        found["".join(parts)] = None
        source = rng.choice(sources)
        start = rng.randrange(len(source) - 300)
        found[source[start : start + rng.randint(1, 300)]] = None
    return list(found)


def hypothesis_texts(count: int) -> list[str]:
    """Texts that hypothesis thinks of."""
    texts: list[str] = []

    @settings(max_examples=count, database=None, derandomize=True, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.text(max_size=30))
    def collect(text: str) -> None:
        texts.append(text)

    collect()
    return texts

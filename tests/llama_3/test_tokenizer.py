"""The tokenizer against transformers on a small trained vocabulary, and the chat format against its template."""

import base64
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment
from tokenizers import Regex, decoders, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from llama_3.chat_format import ChatFormat, Message
from llama_3.tokenizer import SPLIT_PATTERN, StreamDecoder, Tokenizer, load_tokenizer, special_names
from tests.tiny import byte_tokenizer, write_tiny_checkpoint

TEXTS = [
    "Hello world, it's the 12345th day of the world.\n\n  Hello   again!\r\n\tyes",
    "Zoë naïve 你好世界 🦙👩‍👩‍👧 Việt \u0301 e\u0301 \x00\x7f",
    "<|eot_id|> is <|begin_of_text|> typed by hand",
    "",
    " ",
    "x" * 3000,
]
TEMPLATE_3_0 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """A byte-level BPE of 400 tokens trained by `tokenizers`, and the same written as a tiktoken file."""
    fast = FastTokenizer(BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    fast.decoder = decoders.ByteLevel()
    corpus = [*TEXTS[:2], "the world and the day, the hello of the world is the day\n\n" * 5, "你好 你好 🦙🦙" * 5]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(corpus, BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    folder = tmp_path_factory.mktemp("trained")
    letters = {letter: bytes([byte]) for byte, letter in byte_letters().items()}
    lines = [
        base64.b64encode(b"".join(letters[letter] for letter in piece)).decode() + f" {rank}"
        for piece, rank in sorted(fast.get_vocab().items(), key=lambda item: item[1])
    ]
    (folder / "tokenizer.model").write_text("\n".join(lines))
    wrap: Any = PreTrainedTokenizerFast
    return load_tokenizer(folder), wrap(tokenizer_object=fast)


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_transformers(text: str, trained: tuple[Tokenizer, PreTrainedTokenizerFast]) -> None:
    ours, theirs = trained
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(text)) == text
    assert ours.encode(text, bos=True) == [ours.bos_id, *ours.encode(text)]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_comes_back(text: str, trained: tuple[Tokenizer, PreTrainedTokenizerFast]) -> None:
    ours, theirs = trained
    tokens = ours.encode(text)
    assert tokens == theirs.encode(text, add_special_tokens=False)
    decoder = StreamDecoder(ours)
    assert "".join(map(decoder.push, tokens)) + decoder.flush() == text == ours.decode(tokens)


def test_a_whole_word_in_the_vocabulary_needs_no_merges(tmp_path: Path) -> None:
    pieces = [bytes([byte]) for byte in range(256)] + [b"ab", b"xyz"]
    lines = [base64.b64encode(piece) + b" %d" % rank for rank, piece in enumerate(pieces)]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("xyz") == [257] and tokenizer.encode("xyzab") == [120, 121, 122, 256]
    assert tokenizer.bos_id == 258 and tokenizer.vocab_size == tokenizer.n_vocab == 258 + 256


def test_specials_have_names_and_are_never_made_from_text() -> None:
    tokenizer = byte_tokenizer()
    assert (tokenizer.bos_id, tokenizer.eot_id, tokenizer.stop_ids) == (256, 265, (257, 264, 265))
    assert tokenizer.special_ids == frozenset(range(256, 272)) and tokenizer.vocab_size == 272
    assert tokenizer.special("<|start_header_id|>") == 262
    assert tokenizer.token_text(265) == "<|eot_id|>" and tokenizer.token_bytes(65) == b"A"
    assert not tokenizer.special_ids & set(tokenizer.encode("<|eot_id|>"))
    assert tokenizer.decode([72, 105, 265, 9999]) == "Hi<|eot_id|><|9999|>"
    with pytest.raises(ValueError, match=r"no special token <\|nope\|>"):
        tokenizer.special("<|nope|>")


def test_special_names_are_those_of_llama_3_1() -> None:
    names = special_names()
    assert len(set(names)) == 256
    assert names[2:6:3] == ["<|reserved_special_token_0|>", "<|reserved_special_token_2|>"]
    assert names[8:11] == ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    assert names[255] == "<|reserved_special_token_247|>"


def test_added_tokens_name_the_specials(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == 272  # config.json leaves room for 16
    added = {str(300 + i): {"content": name} for i, name in enumerate(["<|begin_of_text|>", "<|eot_id|>"])}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert load_tokenizer(tmp_path).special("<|eot_id|>") == 301
    (tmp_path / "tokenizer_config.json").unlink()
    entries = [{"id": 256, "content": "<|eot_id|>"}, {"id": 257, "content": "<|begin_of_text|>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": entries}))
    assert load_tokenizer(tmp_path).bos_id == 257


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"\x0a\x0e\x0a\x05<unk>", "is a sentencepiece tokenizer"),
        (b"IQ== 0\nIg= 1\n", "line 2 is not a base64 token and its rank"),
        (b"IQ== 0 1\n", "line 1 is not a base64 token"),
        (b"IQ== 0\nIg== 2\n", "does not hold ranks 0 to N-1"),
        (b"", "does not hold ranks 0 to N-1"),
    ],
)
def test_other_tokenizer_files_are_refused_in_one_sentence(raw: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(raw)
    with pytest.raises(ValueError, match=sentence):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no tokenizer\.model in"):
        load_tokenizer(tmp_path)


def test_characters_split_over_tokens_appear_whole() -> None:
    tokenizer = byte_tokenizer()
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(token) for token in "é🦙!".encode()] == ["", "é", "", "", "", "🦙", "!"]
    assert decoder.flush() == ""
    assert [decoder.push(token) for token in (0xF0, 0x9F, 65)] == ["", "", "\ufffdA"]
    assert decoder.push(0xC3) == "" and decoder.flush() == "\ufffd"


# Chat format


DIALOG = [
    Message("system", "  Be brief.\n"),
    Message("user", "Who are you?"),
    Message("assistant", "I am a llama. 🦙"),
    Message("user", "\n\nReally?  \n"),
]


def render(messages: list[Message], generation_prompt: bool) -> str:
    template = Environment(autoescape=False).from_string(TEMPLATE_3_0)
    plain = [{"role": message.role, "content": message.content} for message in messages]
    return template.render(messages=plain, bos_token="<|begin_of_text|>", add_generation_prompt=generation_prompt)


@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_dialog_reads_as_the_template_of_llama_3(n: int, generation_prompt: bool) -> None:
    tokenizer = byte_tokenizer()
    tokens, spans = ChatFormat(tokenizer).encode_dialog(DIALOG[:n], generation_prompt=generation_prompt)
    assert tokenizer.decode(tokens) == render(DIALOG[:n], generation_prompt)
    assert spans[0].start == 1
    assert all(a.end == b.start for a, b in pairwise(spans))
    for message, span in zip(DIALOG, spans, strict=False):
        assert span.role == message.role and tokens[span.start] == 262
        assert tokenizer.decode(tokens[span.content_start : span.content_end]) == message.content.strip()
        assert tokens[span.content_end : span.end] == [tokenizer.eot_id]


def test_token_ids_of_a_dialog_equal_transformers(trained: tuple[Tokenizer, PreTrainedTokenizerFast]) -> None:
    ours, theirs = trained
    theirs.add_special_tokens({"additional_special_tokens": special_names()})
    dialog = [*DIALOG, Message("assistant", ""), Message("user", "12 !!\u00a0")]
    tokens, _ = ChatFormat(ours).encode_dialog(dialog)
    assert tokens == theirs.encode(render(dialog, True), add_special_tokens=False)


def test_a_special_token_typed_by_a_user_ends_nothing() -> None:
    tokenizer = byte_tokenizer()
    tokens, _ = ChatFormat(tokenizer).encode_dialog([Message("user", "a<|eot_id|>b")])
    assert tokens.count(tokenizer.eot_id) == 1


def test_the_oldest_turns_are_dropped_first() -> None:
    chat = ChatFormat(byte_tokenizer())
    dialog = [DIALOG[0]]
    for i in range(4):
        dialog += [Message("user", f"question {i}"), Message("assistant", f"answer {i}")]
    dialog.append(Message("user", "last"))
    whole, whole_spans = chat.encode_dialog(dialog)
    assert chat.fit_dialog(dialog, len(whole)) == (whole, whole_spans, 0)
    for budget in range(len(whole) - 1, 60, -13):
        tokens, spans, dropped = chat.fit_dialog(dialog, budget)
        assert dropped > 0 and dropped % 2 == 0 and len(tokens) <= budget
        assert (tokens, spans) == chat.encode_dialog([dialog[0], *dialog[1 + dropped :]])
    shortest = len(chat.encode_dialog([dialog[0], dialog[-1]])[0])
    assert chat.fit_dialog(dialog, shortest)[2] == 8
    with pytest.raises(ValueError, match=r"the last message is \d+ tokens long and \d+ of the \d+ are left"):
        chat.fit_dialog(dialog, shortest - 1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("tokenizer.json", '{"added_tokens": [{}]}'),
    ],
)
def test_added_tokens_that_cannot_be_read_are_named(name: str, content: str, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} does not list its added tokens"):
        load_tokenizer(tmp_path)

"""Damaged, foreign and hostile tokenizer files: one sentence each, nothing executed."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordPiece

from llama_3.tokenizer import load_tokenizer
from llama_3.tokenizer_gguf import read_gguf_vocabulary
from tests.llama_3 import vocabularies
from tests.llama_3.vocabularies import gguf_lists
from tests.tiny import byte_ranks, write_tiny_checkpoint


def refused(path: Path) -> str:
    """The sentence with which `path` is refused."""
    with pytest.raises((ValueError, OSError)) as caught:
        load_tokenizer(path)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 600
    return sentence


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"\x0a\x0e\x0a\x05<unk>", "is not a sentencepiece model that can be used"),
        (b"\x0a", "is not a sentencepiece model that can be used"),
        (b"IQ== 0\nIg= 1\n", "line 2 is not a base64 token and its rank"),
        (b"IQ== 0 1\n", "line 1 is not a base64 token"),
        (b"\x80\x04\x95garbage", "line 1 is not a base64 token"),
        (b"IQ== 0\nIg== 2\n", "does not hold ranks 0 to N-1"),
        (b"", "does not hold ranks 0 to N-1"),
    ],
)
def test_a_damaged_tokenizer_model(raw: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(raw)
    assert sentence in refused(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    assert "there is no tokenizer.model or tokenizer.json in" in refused(tmp_path)
    assert "there is no tokenizer.model" in refused(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ("", "is not valid JSON"),
        ("[]", "holds a list where a JSON object was expected"),
        ("{}", "of type None"),
        ('{"model": {"type": "BPE"}}', "neither in bytes nor with U+2581"),
        ('{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}', "is not a tokenizer that can be used"),
        ('{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}, "added_tokens": 3}', "is not a tokenizer"),
        ('{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}, "added_tokens": [[]]}', "is not a tokenizer"),
    ],
)
def test_a_damaged_tokenizer_json(raw: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(raw)
    assert sentence in refused(tmp_path)


def write_json(folder: Path, vocab: list[str], decoder: dict[str, Any], *added: str) -> None:
    """A `tokenizer.json` with this table, `</s>` and these tokens added."""
    ids = {piece: index for index, piece in enumerate(dict.fromkeys([*vocab, *added, "</s>"]))}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = [{"id": ids[name], "content": name, "special": name == "</s>"} | plain for name in (*added, "</s>")]
    model = {"type": "BPE", "vocab": ids, "merges": []}
    raw = {"version": "1.0", "added_tokens": tokens, "pre_tokenizer": decoder, "decoder": decoder, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(raw))


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    ("piece", "decoder", "said"),
    [
        ("\u4e2d", BYTE_LEVEL, r"\u4e2d"),
        ("a b", BYTE_LEVEL, "a b"),
        ("<0xZZ>", METASPACE, "<0xZZ>"),
        ("<0x-1>", METASPACE, "<0x-1>"),
    ],
)
def test_a_token_that_spells_no_bytes(piece: str, decoder: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_json(tmp_path, ["a", "b", piece], decoder)
    assert refused(tmp_path).endswith(f"tokenizer.json has a token {said} that spells no bytes")


@pytest.mark.parametrize("decoder", [BYTE_LEVEL, METASPACE])
def test_an_added_token_is_text_although_the_table_lists_it(decoder: dict[str, Any], tmp_path: Path) -> None:
    added = ["\u4e2d \u6587", "<0xZZ>"]
    write_json(tmp_path, ["a", "b", *added], decoder, *added)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("\u4e2d \u6587<0xZZ>") == [2, 3]
    assert tokenizer.decode([2, 3]) == "\u4e2d \u6587<0xZZ>" and tokenizer.decode([0, 1]) == "ab"


def test_a_tokenizer_of_another_kind_is_named(tmp_path: Path) -> None:
    FastTokenizer(WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    assert "of type WordPiece, and only BPE and Unigram are supported" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("tokenizer.json", '{"added_tokens": [{}]}'),
        ("tokenizer.json", '{"added_tokens": [{"id": 1e30, "content": "x"}]}'),
    ],
)
def test_added_tokens_that_cannot_be_read_are_named(name: str, content: str, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    (tmp_path / name).write_text(content)
    assert f"{name} does not list its added tokens" in refused(tmp_path)


def test_a_special_token_that_is_no_text(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    added = {"256": {"content": "<|eot_id|>"}, "257": {"content": "\ud83e"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert "tokenizer.model has a special token '\\ud83e', which is no text" in refused(tmp_path)


@pytest.mark.parametrize("size", ['"many"', "[1]"])
def test_a_vocabulary_size_that_is_no_number(size: str, tmp_path: Path) -> None:
    vocabularies.write_ranks(tmp_path, byte_ranks())
    (tmp_path / "config.json").write_text(f'{{"vocab_size": {size}}}')
    assert "which is no whole number" in refused(tmp_path)


def test_a_vocabulary_with_no_room_for_special_tokens(tmp_path: Path) -> None:
    vocabularies.write_ranks(tmp_path, byte_ranks())
    (tmp_path / "config.json").write_text('{"vocab_size": 256}')
    assert "names no token that begins a text" in refused(tmp_path)


LISTS = gguf_lists(["<unk>", "<s>", "</s>", "a"], [2, 3, 3, 1], 1, 2, model="llama", scores=[0.0, 0.0, 0.0, -1.0])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "bert"}, "a tokenizer of kind 'bert'"),
        ({"model": None}, "a tokenizer of kind None"),
        ({"tokens": []}, "lacks the list tokenizer.ggml.tokens"),
        ({"tokens": [1, 2, 3, 4]}, "lacks the list tokenizer.ggml.tokens"),
        ({"token_type": [1]}, "lists 4 tokens but 1 token types"),
        ({"scores": [0.5]}, "lists 4 tokens but 1 scores"),
        ({"scores": None}, "lacks the list tokenizer.ggml.scores"),
        ({"tokens": ["<unk>", "<s>", "<s>", "a"]}, "is not a sentencepiece model that can be used"),
        ({"token_type": [1, 1, 1, 1]}, "is not a sentencepiece model that can be used"),
        ({"token_type": [2, 3, 3, 6]}, "is not a sentencepiece model that can be used"),
        ({"token_type": [2, 3, 3, -1]}, "has a token, score or type that cannot be used"),
        ({"scores": [0.0, 0.0, 0.0, 1e300]}, "has a token, score or type that cannot be used"),
        ({"model": "gpt2", "pre": []}, "cuts words the way [] does"),
        ({"model": "gpt2"}, "cuts words the way None does, and only llama-bpe, llama3"),
        ({"model": "gpt2", "pre": "qwen2"}, "cuts words the way 'qwen2' does"),
        ({"model": "gpt2", "pre": "llama-bpe"}, "does not hold ranks 0 to N-1"),
        ({"model": "gpt2", "pre": "smollm"}, "lacks the list tokenizer.ggml.merges"),
        ({"model": "gpt2", "pre": "smollm", "merges": ["x y"]}, "is not a tokenizer that can be used"),
    ],
)
def test_damaged_gguf_lists(changes: dict[str, Any], sentence: str) -> None:
    metadata = LISTS | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(ValueError) as caught:
        read_gguf_vocabulary(metadata, "tiny.gguf")
    assert str(caught.value).startswith("tiny.gguf ") and sentence in str(caught.value)


def test_the_lists_that_the_damaged_ones_are_made_from_are_whole() -> None:
    tokenizer = read_gguf_vocabulary(LISTS, "tiny.gguf")
    assert tokenizer.encode("a", bos=True)[-1] == 3 and tokenizer.special_ids == {0, 1, 2}


@pytest.mark.parametrize("form", ["tiktoken", "llama-3 json", "sentencepiece", "llama-2 json"])
def test_fuzzed_files_load_or_are_refused_in_a_sentence(form: str, tmp_path: Path) -> None:
    if form == "tiktoken":
        file = vocabularies.write_ranks(tmp_path, byte_ranks() | {b"ab": 256})
    elif form == "llama-3 json":
        vocabularies.write_llama_3_json(tmp_path, vocabularies.write_ranks(tmp_path / "model", byte_ranks()))
        file = tmp_path / "tokenizer.json"
    else:
        model = vocabularies.train_sentencepiece(400)
        file = tmp_path / "tokenizer.model"
        file.write_bytes(model.serialized_model_proto())
        if form == "llama-2 json":
            vocabularies.write_llama_2_json(tmp_path, model)
            file = tmp_path / "tokenizer.json"
    whole, rng, loaded = file.read_bytes(), random.Random(3), 0
    for _ in range(60):
        file.write_bytes(damage(whole, rng))
        try:
            tokenizer = load_tokenizer(tmp_path)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and len(str(error)) < 600
        else:
            loaded += 1
            assert isinstance(tokenizer.decode(tokenizer.encode("Zoë 12 <s>\n")), str)
    assert loaded < 60


def damage(whole: bytes, rng: random.Random) -> bytes:
    """`whole` cut off, with bytes changed, with a stretch gone, or (JSON) with a value exchanged."""
    kind, at = rng.randrange(4), rng.randrange(len(whole))
    if kind == 0:
        return whole[:at]
    if kind == 1:
        changed = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if kind == 2 or not whole.startswith(b"{"):
        return whole[:at] + whole[at + rng.randint(1, 200) :]
    raw = json.loads(whole)
    target = rng.choice([raw, raw["model"], rng.choice(raw["added_tokens"])])
    key = rng.choice(list(target))
    target[key] = rng.choice([None, -1, 10**12, "x", [], {}, 1e300, {"type": "x"}, [[]], True])
    return json.dumps(raw).encode()

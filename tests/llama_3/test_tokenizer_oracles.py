"""Every form of a vocabulary against tiktoken, sentencepiece and transformers, on ten thousand strings."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from tokenizers import pre_tokenizers

from llama_3.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from llama_3.tokenizer_gguf import read_gguf_vocabulary
from llama_3.tokenizer_json import JsonTokenizer
from llama_3.tokenizer_sentencepiece import BYTE, CONTROL, UNKNOWN, SentencePieceTokenizer
from llama_3.tokenizer_tiktoken import SPLIT_PATTERN, TiktokenTokenizer
from llama_3.vocabulary import special_names
from tests.llama_3 import vocabularies
from tests.llama_3.vocabularies import gguf_lists

N_RANKS = 900
NORMAL = 1


@pytest.fixture(scope="module")
def texts() -> list[str]:
    found = vocabularies.strings()
    assert len(set(found)) >= 10_000
    return found


@pytest.fixture(scope="module")
def llama_3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[bytes, int]]:
    """A folder with `model/tokenizer.model`, `json/tokenizer.json`, `trained/tokenizer.json`; and the ranks."""
    folder = tmp_path_factory.mktemp("llama_3")
    fast = vocabularies.byte_level(vocabularies.corpus(), N_RANKS, vocabularies.llama_3_cut())
    ranks = vocabularies.ranks_of(fast)
    model = vocabularies.write_ranks(folder / "model", ranks)
    vocabularies.write_llama_3_json(folder / "json", model)
    fast.add_special_tokens(special_names())
    (folder / "trained").mkdir()
    fast.save(str(folder / "trained" / "tokenizer.json"))
    vocabularies.write_config(folder / "trained", bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    return folder, ranks


@pytest.fixture(scope="module")
def llama_2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with `model/tokenizer.model` and `json/tokenizer.json`, and the sentencepiece library's processor."""
    folder = tmp_path_factory.mktemp("llama_2")
    processor = vocabularies.train_sentencepiece()
    (folder / "model").mkdir()
    (folder / "model" / "tokenizer.model").write_bytes(processor.serialized_model_proto())
    vocabularies.write_llama_2_json(folder / "json", processor)
    return folder, processor


def as_text(theirs: Any, texts: list[str]) -> list[list[int]]:
    """What transformers makes of texts in which special tokens are text."""
    ids: list[list[int]] = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def llama_3_metadata(ranks: dict[bytes, int]) -> dict[str, Any]:
    letters = {byte: letter for letter, byte in vocabularies.byte_letters().items()}
    tokens = ["".join(letters[byte] for byte in piece) for piece in sorted(ranks, key=ranks.__getitem__)]
    types = [NORMAL] * len(ranks) + [CONTROL] * 256
    first = len(ranks)
    return gguf_lists([*tokens, *special_names()], types, first, first + 9, model="gpt2", pre="llama-bpe")


def test_llama_3_in_three_forms_equals_tiktoken_and_transformers(
    llama_3: tuple[Path, dict[bytes, int]], texts: list[str]
) -> None:
    folder, ranks = llama_3
    forms = [load_tokenizer(folder / "model"), load_tokenizer(folder / "json")]
    forms.append(read_gguf_vocabulary(llama_3_metadata(ranks), "tiny.gguf"))
    assert all(type(form) is TiktokenTokenizer for form in forms)
    encoding = tiktoken.Encoding("oracle", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    expected = encoding.encode_ordinary_batch(texts, num_threads=1)
    theirs = vocabularies.transformers_of(folder / "json")
    assert as_text(theirs, texts) == expected
    for form in forms:
        assert [form.encode(text) for text in texts] == expected
        assert [form.decode(ids) for ids in expected] == texts
    assert_same_specials(forms, theirs, special_names())


def test_a_json_file_with_the_merges_of_its_training_is_exact_too(
    llama_3: tuple[Path, dict[bytes, int]], texts: list[str]
) -> None:
    ours = load_tokenizer(llama_3[0] / "trained")
    assert type(ours) is JsonTokenizer  # its merges are fewer than its ranks would allow
    theirs = vocabularies.transformers_of(llama_3[0] / "trained")
    assert [ours.encode(text) for text in texts] == as_text(theirs, texts)
    assert all(ours.decode(ours.encode(text)) == text for text in texts[::10])
    assert_same_specials([ours], theirs, special_names())


def assert_same_specials(forms: list[Tokenizer], theirs: Any, names: list[str]) -> None:
    ids = theirs.convert_tokens_to_ids(names)
    for form in forms:
        assert [form.special(name) for name in names] == ids and form.special_ids == frozenset(ids)
        assert (form.bos_id, form.eot_id) == (theirs.bos_token_id, theirs.eos_token_id)
        assert form.vocab_size == len(theirs)
        assert form.decode(ids) == "".join(names)


@pytest.mark.parametrize("name", ["smollm", "gpt-2"])
def test_other_byte_level_vocabularies_from_gguf_lists(name: str, texts: list[str]) -> None:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    cut = [pre_tokenizers.Digits(individual_digits=True), plain] if name == "smollm" else [plain]
    fast = vocabularies.byte_level(vocabularies.corpus(), 700, cut, whole_words=False)
    model = json.loads(fast.to_str())["model"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(model["vocab"], key=model["vocab"].get)]
    types = [CONTROL] * 3 + [NORMAL] * 700
    merges = [" ".join(merge) for merge in model["merges"]]
    ours = read_gguf_vocabulary(gguf_lists(tokens, types, 1, 2, model="gpt2", pre=name, merges=merges), "tiny.gguf")
    texts = texts[::4]
    expected = [[token + 3 for token in encoding.ids] for encoding in fast.encode_batch(texts)]
    assert [ours.encode(text) for text in texts] == expected
    assert (ours.bos_id, ours.eot_id, ours.special_ids) == (1, 2, {0, 1, 2})
    assert ours.stop_ids == (2, 0) and ours.decode([1, *expected[5]]) == "<|im_start|>" + texts[5]


def test_sentencepiece_equals_the_library_and_transformers(llama_2: tuple[Path, Any], texts: list[str]) -> None:
    folder, processor = llama_2
    forms = [load_tokenizer(folder / "model"), read_gguf_vocabulary(llama_2_metadata(processor), "tiny.gguf")]
    assert all(type(form) is SentencePieceTokenizer for form in forms)
    expected = processor.encode(texts)
    reversible = [text for text in texts if "▁" not in text]
    assert len(reversible) > 9_000
    for form in forms:
        assert [form.encode(text) for text in texts] == expected
        assert [form.decode(form.encode(text)) for text in reversible] == reversible
    fast, theirs = load_tokenizer(folder / "json"), vocabularies.transformers_of(folder / "json")
    assert type(fast) is JsonTokenizer
    expected = as_text(theirs, texts)
    assert [fast.encode(text) for text in texts] == expected
    assert [fast.decode(ids) for text, ids in zip(texts, expected, strict=True) if "▁" not in text] == reversible
    assert_same_specials([forms[0], fast], theirs, ["<unk>", "<s>", "</s>"])


def llama_2_metadata(processor: Any) -> dict[str, Any]:
    ids = range(processor.get_piece_size())
    types = [
        UNKNOWN if processor.is_unknown(i) else CONTROL if processor.is_control(i) else
        BYTE if processor.is_byte(i) else NORMAL for i in ids
    ]  # fmt: skip
    scores = [processor.get_score(i) for i in ids]
    return gguf_lists([processor.id_to_piece(i) for i in ids], types, 1, 2, model="llama", scores=scores)


def test_a_stream_never_shows_half_a_character(
    llama_3: tuple[Path, dict[bytes, int]], llama_2: tuple[Path, Any], texts: list[str]
) -> None:
    for folder in (llama_3[0] / "json", llama_3[0] / "trained", llama_2[0] / "model", llama_2[0] / "json"):
        tokenizer = load_tokenizer(folder)
        for text in texts[::20]:
            if "\ufffd" in text or "▁" in text:
                continue
            decoder = StreamDecoder(tokenizer)
            shown = [decoder.push(token) for token in tokenizer.encode(text)]
            assert decoder.flush() == "" and "\ufffd" not in "".join(shown)
            assert "".join(shown) in (text, " " + text)  # in mid-text the space in front is part of the text

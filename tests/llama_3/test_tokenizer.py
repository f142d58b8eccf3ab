"""Small vocabularies: special tokens, whole words, which file wins, long runs, streams. Oracles are another file."""

import json
import time
from pathlib import Path

import pytest
import tiktoken

from llama_3.tokenizer import StreamDecoder, check_vocabulary, load_tokenizer
from llama_3.tokenizer_json import JsonTokenizer
from llama_3.tokenizer_sentencepiece import SentencePieceTokenizer
from llama_3.tokenizer_tiktoken import SPLIT_PATTERN, TiktokenTokenizer
from llama_3.vocabulary import special_names
from tests.llama_3 import vocabularies
from tests.tiny import byte_ranks, byte_tokenizer, tiny_config, write_tiny_checkpoint


def test_a_whole_word_in_the_vocabulary_needs_no_merges(tmp_path: Path) -> None:
    model = vocabularies.write_ranks(tmp_path / "model", byte_ranks() | {b"ab": 256, b"xyz": 257})
    vocabularies.write_llama_3_json(tmp_path / "json", model)
    for form in ("model", "json"):
        tokenizer = load_tokenizer(tmp_path / form)
        assert tokenizer.encode("xyz") == [257] and tokenizer.encode("xyzab") == [120, 121, 122, 256]
        assert tokenizer.bos_id == 258 and tokenizer.vocab_size == 258 + 256


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


def test_characters_split_over_tokens_appear_whole() -> None:
    tokenizer = byte_tokenizer()
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(token) for token in "é🦙!".encode()] == ["", "é", "", "", "", "🦙", "!"]
    assert decoder.flush() == ""
    assert [decoder.push(token) for token in (0xF0, 0x9F, 65)] == ["", "", "\ufffdA"]
    assert decoder.push(0xC3) == "" and decoder.flush() == "\ufffd"


def test_a_space_of_the_tokenizers_own_does_not_open_a_text() -> None:
    ours = SentencePieceTokenizer(vocabularies.train_sentencepiece().serialized_model_proto(), "m")
    for tokenizer, own_space in ((ours, True), (byte_tokenizer(), False)):
        assert tokenizer.own_space == own_space
        for opens in (True, False):
            decoder = StreamDecoder(tokenizer, opens=opens)
            text = "".join(map(decoder.push, tokenizer.encode("the cat  sat")))
            assert text == ("" if opens or not own_space else " ") + "the cat  sat"


def test_a_texts_first_token_is_asked_for() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("a", bos=True) == [256, 97] and tokenizer.encode("", bos=True) == [256]
    assert tokenizer.encode_after_special("a") == [97]


def test_half_a_surrogate_pair_is_a_replacement_character(tmp_path: Path) -> None:
    processor = vocabularies.train_sentencepiece()
    vocabularies.write_llama_2_json(tmp_path, processor)
    forms = [
        byte_tokenizer(),
        SentencePieceTokenizer(processor.serialized_model_proto(), "m"),
        load_tokenizer(tmp_path),
    ]
    for tokenizer in forms:
        assert tokenizer.decode(tokenizer.encode("a\ud83e.")) == "a\ufffd."
        assert tokenizer.decode(tokenizer.encode("\ud83e\udd99")) == "🦙"


@pytest.mark.parametrize("letter", [" ", "a", "\n", "!", "1", "é", " a"])
def test_a_million_like_characters_take_no_second(letter: str) -> None:
    tokenizer = byte_tokenizer()
    start = time.process_time()
    tokens = tokenizer.encode(letter * (1_000_000 // len(letter)))
    assert time.process_time() - start < 5  # seconds; without the limits tiktoken fails or runs for minutes
    assert tokenizer.decode(tokens) == letter * (1_000_000 // len(letter))


def test_long_text_is_cut_as_in_metas_code() -> None:
    ranks = byte_ranks() | {b"aa": 256, b"  ": 257}
    tokenizer = TiktokenTokenizer(ranks, {"<|begin_of_text|>": 258, "<|eot_id|>": 259})
    plain = tiktoken.Encoding("oracle", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    usual = "aab  a\n" * 50_000
    assert tokenizer.encode(usual) == plain.encode_ordinary(usual)
    run = "a" * 24_999 + " " + "a" * 25_001
    assert tokenizer.encode(run) == [*plain.encode_ordinary(run[: 2 * 25_000]), 97]
    cut = "b" + "a " * 200_000  # the 400,000th character stands between an "a" and its space
    assert tokenizer.encode(cut) == plain.encode_ordinary(cut[:400_000]) + plain.encode_ordinary(cut[400_000:])


# Which file wins


def test_of_several_files_the_form_of_training_wins(tmp_path: Path) -> None:
    llama_2 = vocabularies.train_sentencepiece()
    (tmp_path / "tokenizer.model").write_bytes(llama_2.serialized_model_proto())
    assert type(load_tokenizer(tmp_path)) is SentencePieceTokenizer
    vocabularies.write_llama_2_json(tmp_path, llama_2)
    assert type(load_tokenizer(tmp_path)) is JsonTokenizer  # as transformers chooses for TinyLlama's folder
    vocabularies.write_ranks(tmp_path, byte_ranks())
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    assert type(load_tokenizer(tmp_path)) is TiktokenTokenizer
    vocabularies.write_llama_3_json(tmp_path / "json", tmp_path / "tokenizer.model")
    (tmp_path / "json" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path).special("<|eot_id|>") == 256 + 9


def test_metas_download_keeps_it_in_a_subfolder(tmp_path: Path) -> None:
    vocabularies.write_ranks(tmp_path / "original", byte_ranks())
    (tmp_path / "original" / "params.json").write_text(json.dumps({"vocab_size": 256 + 12}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (268, 265)
    assert load_tokenizer(tmp_path / "original").special_ids == tokenizer.special_ids


def test_tokens_added_behind_a_sentencepiece_model_are_special(tmp_path: Path) -> None:
    model = vocabularies.train_sentencepiece()
    size = model.get_piece_size()
    (tmp_path / "tokenizer.model").write_bytes(model.serialized_model_proto())
    added = {"0": {"content": "<unk>"}, str(size): {"content": "<|im_end|>"}}
    vocabularies.write_config(tmp_path, added_tokens_decoder=added, eos_token={"content": "<|im_end|>"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special("<|im_end|>") == tokenizer.eot_id == size and tokenizer.vocab_size == size + 1
    assert tokenizer.stop_ids == (size, 2) and size not in tokenizer.encode("a<|im_end|>")


def test_a_space_is_put_only_where_the_file_says(tmp_path: Path) -> None:
    vocabularies.write_llama_2_json(tmp_path, vocabularies.train_sentencepiece())
    file = tmp_path / "tokenizer.json"
    raw = json.loads(file.read_text())
    every = load_tokenizer(tmp_path)
    assert every.encode_after_special("the") == every.encode("the")
    assert every.decode([1, *every.encode("the"), 2, *every.encode("the")]) == "<s>the</s>the"
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    file.write_text(json.dumps(raw | {"normalizer": None, "pre_tokenizer": metaspace}))
    first = load_tokenizer(tmp_path)
    assert first.encode("the") == every.encode("the") and first.token_text(first.encode("the")[0]) == " the"
    inside = first.encode_after_special("the")
    assert first.decode(inside) == "".join(map(first.token_text, inside)) == "the"
    assert first.decode([1, *first.encode("the"), 2, *inside, *first.encode("the")]) == "<s>the</s>the the"


def test_what_is_not_special_in_the_file_is_found_in_text(tmp_path: Path) -> None:
    model = vocabularies.write_ranks(tmp_path / "model", byte_ranks())
    vocabularies.write_llama_3_json(tmp_path, model)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["added_tokens"][11] |= {"content": "<think>", "special": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(tmp_path)
    assert type(tokenizer) is JsonTokenizer and tokenizer.encode("a<think><|eot_id|>")[:3] == [97, 267, 60]
    assert 267 not in tokenizer.special_ids and tokenizer.token_text(267) == "<think>"
    theirs = vocabularies.transformers_of(tmp_path)
    text = "a <think>\n b<|eot_id|> Zoë"
    assert tokenizer.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_a_tokenizer_with_ids_beyond_the_model_is_another_models() -> None:
    tokenizer = TiktokenTokenizer(byte_ranks() | {b"ab": 256, b"cd": 257}, {"<|begin_of_text|>": 0, "</s>": 1})
    for size in (258, 300):
        check_vocabulary(tokenizer, tiny_config(vocab_size=size))
    with pytest.raises(ValueError, match=r"^the tokenizer's ids go up to 257 and the model's to 256$") as caught:
        check_vocabulary(tokenizer, tiny_config(vocab_size=257))
    assert vars(caught.value)["hint"] == "use the tokenizer that the model was published with"


def test_of_special_tokens_only_the_ends_need_rows() -> None:
    tokenizer = byte_tokenizer()
    assert (tokenizer.eot_id, tokenizer.vocab_size) == (265, 272)
    check_vocabulary(tokenizer, tiny_config(vocab_size=266))
    for rows in (265, 257):
        with pytest.raises(ValueError, match=f"go up to 265 and the model's to {rows - 1}"):
            check_vocabulary(tokenizer, tiny_config(vocab_size=rows))


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_beyond_the_model_may_stay_unused(special: bool, tmp_path: Path) -> None:
    model = vocabularies.train_sentencepiece(400)
    vocabularies.write_llama_2_json(tmp_path, model)
    raw, size = json.loads((tmp_path / "tokenizer.json").read_text()), model.get_piece_size()
    raw["added_tokens"].append(raw["added_tokens"][-1] | {"id": size, "content": "[PAD]", "special": special})
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode([size]) == "[PAD]" and tokenizer.vocab_size == size + 1
    check_vocabulary(tokenizer, tiny_config(vocab_size=size))
    with pytest.raises(ValueError, match=f"go up to {size - 1} and"):
        check_vocabulary(tokenizer, tiny_config(vocab_size=size - 1))

"""Text files in all their forms become documents, rows of tokens, or one sentence."""

import gzip
import json
import lzma
import resource
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from llama_3.chat_format import ChatFormat, Message
from llama_3.tokenizer_tiktoken import TiktokenTokenizer
from tests.tiny import byte_ranks, byte_tokenizer
from train.documents import read_documents
from train.errors import TrainError
from train.text import default_chat, interleave, read_rows

TWO = "one\nline\n<|endoftext|>\ntwo\n"


def test_the_same_documents_from_txt_xz_and_gz(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TWO)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(TWO.encode()))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TWO.encode()))
    for name in ("a.txt", "a.txt.xz", "a.txt.gz"):
        assert list(read_documents(tmp_path / name)) == ["one\nline", "two"]


def test_a_jsonl_line_is_text_or_a_dialog(tmp_path: Path) -> None:
    dialog = [{"role": "user", "content": "hi"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}) + "\n\n" + json.dumps({"messages": dialog}))
    assert list(read_documents(tmp_path / "a.jsonl")) == ["x", [Message("user", "hi")]]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 of"),
        ("[1]", "not a JSON object"),
        ('{"id": 1}', "neither `text`"),
        ('{"messages": [{}]}', "lacks"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_bad_line_is_named_with_its_file(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line)
    with pytest.raises(TrainError, match=words) as caught:
        list(read_documents(tmp_path / "a.jsonl"))
    assert "line 2 of" in str(caught.value) and "a.jsonl" in str(caught.value)


def test_other_bad_files_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.doc").write_text("x")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(TWO.encode() * 99)[:-30])
    packed = bytearray(gzip.compress(TWO.encode() * 99))
    packed[10:20] = b"\xff" * 10  # the kind of the first block, which zlib itself refuses
    (tmp_path / "d.txt.gz").write_bytes(packed)
    for name, words in [
        ("d.txt.gz", "damaged"),
        ("a.doc", "no text file this"),
        ("a.txt", "not UTF-8"),
        ("b.txt.xz", "damaged"),
        ("c.txt", "there is no"),
    ]:
        with pytest.raises(TrainError, match=words):
            list(read_documents(tmp_path / name))


def test_sources_give_equal_numbers_of_tokens_until_one_ends() -> None:
    long, short = [[0] * 10] * 4, [[1] * 2] * 10
    drawn = list(interleave([iter(long), iter(short)], len))
    assert [tokens[0] for tokens in drawn[:12]].count(1) >= 9
    assert sorted(map(len, drawn)) == [2] * 10 + [10] * 4


def test_of_many_sources_few_are_open_and_each_gives_all_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.text.OPEN", 3)
    opened, most = set[int](), 0

    def source(number: int) -> Iterator[int]:
        nonlocal most
        opened.add(number)
        most = max(most, len(opened))
        yield from [number] * (number % 4 + 1)
        opened.remove(number)

    drawn = list(interleave(map(source, range(20)), lambda item: 1))
    assert sorted(drawn) == [number for number in range(20) for _ in range(number % 4 + 1)]
    assert most == 3 and not opened and drawn[:3] == [0, 1, 2]
    assert drawn.index(7) < drawn.index(12), "one that comes in late shares with the others"


def test_a_folder_of_more_files_than_may_be_open(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for number in range(300):
        (tmp_path / f"{number:03}.txt").write_text(f"text {number}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        assert len(list(read_rows([tmp_path], byte_tokenizer(), None, 40))) == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_the_system_says_of_a_file_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.txt").write_text("text")
    monkeypatch.setattr("train.documents._open", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(TrainError, match=r"t\.txt cannot be read: Permission denied"):
        list(read_documents(tmp_path / "t.txt"))


def test_a_long_document_becomes_rows_that_each_begin_with_bos(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh\n<|endoftext|>\nxy")
    tokenizer = byte_tokenizer()
    rows = list(read_rows([tmp_path / "a.txt"], tokenizer, None, 4))
    assert [tokenizer.decode(row.tokens[1:]) for row in rows] == ["abc", "def", "gh", "xy"]
    assert {row.tokens[0] for row in rows} == {tokenizer.bos_id}
    assert [(row.document, row.offset) for row in rows] == [(0, 0), (0, 3), (0, 6), (1, 0)]


def test_a_dialog_is_written_in_the_chat_format_with_one_bos(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    tokenizer = byte_tokenizer()
    chat = ChatFormat(tokenizer)
    (row,) = read_rows([tmp_path / "a.jsonl"], tokenizer, chat, 200)
    assert row.tokens == chat.encode_dialog([Message("user", "hi"), Message("assistant", "yo")])[0]
    assert row.tokens.count(tokenizer.bos_id) == 1
    (plain,) = read_rows([tmp_path / "a.jsonl"], tokenizer, ChatFormat(tokenizer, "plain"), 200)
    assert tokenizer.decode(plain.tokens) == "<|begin_of_text|>hiyo\n\n"


def test_a_vocabulary_without_headers_reads_text_but_no_dialogs(tmp_path: Path) -> None:
    tokenizer = TiktokenTokenizer(byte_ranks(), {"<|begin_of_text|>": 256, "<|eot_id|>": 257})
    chat = default_chat(tokenizer)
    assert chat is None and isinstance(default_chat(byte_tokenizer()), ChatFormat)
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    assert [row.tokens for row in read_rows([tmp_path / "a.txt"], tokenizer, chat, 9)] == [[256, 97, 98, 99]]
    with pytest.raises(TrainError, match=r"b\.jsonl holds dialogs, but this model has no chat format"):
        list(read_rows([tmp_path / "b.jsonl"], tokenizer, chat, 9))

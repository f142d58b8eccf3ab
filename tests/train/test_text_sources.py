"""Folders and datasets stand for the documents in them; what is not there or not usable is one sentence."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from llama_3.chat_format import Message
from train.documents import HubSource, list_sources, read_documents
from train.errors import TrainError
from train.sentences import write_split


def write_jsonl(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_a_folder_is_its_text_files_in_order(tmp_path: Path) -> None:
    for name in (
        "b.txt",
        "a.TXT.xz",
        "sub/c.v2.jsonl.gz",
        ".hidden/d.txt",
        "sub/.e.txt",
        "readme.md",
        "f.parquet.xz",
        "gz",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = [tmp_path / name for name in ("a.TXT.xz", "b.txt", "sub/c.v2.jsonl.gz")]
    assert list_sources([tmp_path]) == expected
    assert list_sources(["hf:x/y", expected[1], str(tmp_path / "sub")]) == ["hf:x/y", expected[1], expected[2]]


def test_a_folder_without_text_and_a_path_without_a_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "picture.png").touch()
    for source, words in [
        (tmp_path, f"the folder {tmp_path} holds no text file"),
        (tmp_path / "picture.png", "is no text file"),
        (tmp_path / "nowhere", "there is no text file"),
    ]:
        with pytest.raises(TrainError, match=words):
            list_sources([source])


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("hf:a/b", HubSource("a/b")),
        ("hf:a/b:test", HubSource("a/b", split="test")),
        ("hf:a/b:validation_matched", HubSource("a/b", split="validation_matched")),
        ("hf:a/b:en", HubSource("a/b", config="en")),
        ("hf:a/b::odd", HubSource("a/b", split="odd")),
        ("hf:a/b@v1:en:test", HubSource("a/b", "v1", "en", "test")),
        ("hf:/data/folder:train", HubSource("/data/folder")),
    ],
)
def test_what_a_dataset_is_called(written: str, read: HubSource) -> None:
    assert HubSource.parse(written) == read


@pytest.mark.parametrize("written", ["hf:", "hf:@v1", "hf:a:b:c:d"])
def test_what_names_no_dataset(written: str) -> None:
    with pytest.raises(TrainError, match="names no dataset"):
        list(read_documents(written))


def test_a_local_dataset_is_streamed_by_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data" / "train.jsonl", "one", "two")
    write_jsonl(tmp_path / "data" / "test.jsonl", "three")
    assert list(read_documents(f"hf:{tmp_path}")) == ["one", "two"]
    assert list(read_documents(f"hf:{tmp_path}:test")) == ["three"]
    with pytest.raises(TrainError, match=r"cannot be read \(default, dev\)") as caught:
        list(read_documents(f"hf:{tmp_path}:dev"))
    assert "\n" not in str(caught.value) and caught.value.hint


def test_a_dataset_may_hold_dialogs_or_split_text(tmp_path: Path) -> None:
    dialog = {"messages": [{"role": "user", "content": "hi"}]}
    parquet_folder, split_folder, bad = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    parquet_folder.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([dialog]), parquet_folder / "x.parquet")
    write_split([["A. ", "B."], ["C."]], split_folder / "x.parquet")
    (bad / "x.jsonl").parent.mkdir()
    (bad / "x.jsonl").write_text('{"text": "x"}\n{"text": null}\n')
    assert list(read_documents(f"hf:{parquet_folder}")) == [[Message("user", "hi")]]
    assert list(read_documents(f"hf:{split_folder}")) == [("A. ", "B."), ("C.",)]
    with pytest.raises(TrainError, match=r"row 2 of the dataset .* is not usable: it has neither"):
        list(read_documents(f"hf:{bad}"))


def test_a_reader_may_stop_early(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", *(str(i) for i in range(100)))
    documents = read_documents(f"hf:{tmp_path}")
    assert next(documents) == "0"
    del documents  # as an interrupted `for` does


def test_without_the_packages_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    for source, module in [("hf:a/b", "datasets"), (str(tmp_path / "a.parquet"), "pyarrow.parquet")]:
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(TrainError) as caught:
            list(read_documents(source))
        assert caught.value.hint == "pip install 'steer[train]'"


def test_a_parquet_file_that_is_none_or_lacks_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no more")
    parquet.write_table(pyarrow.Table.from_pylist([{"id": 1}]), tmp_path / "b.parquet")
    with pytest.raises(TrainError, match=r"a\.parquet is damaged"):
        list(read_documents(tmp_path / "a.parquet"))
    with pytest.raises(TrainError, match=r"b\.parquet.*neither `text` nor `messages`"):
        list(read_documents(tmp_path / "b.parquet"))


def test_half_a_character_in_json_is_a_replacement(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", "a\ud83db", "\ud83d\ude00")
    assert list(read_documents(tmp_path / "a.jsonl")) == ["a\ufffdb", "\U0001f600"]

"""Rows of any folder: each once an epoch, the same at the same position, none that is held out, bad files named."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from train import reader as reading
from train.errors import TrainError
from train.preprocess import make_plan, write_plan
from train.reader import BLOCK, ShardReader, Source, open_source
from train.shards import FORMAT, VERSION, write_json, write_shard
from train.text import is_held_out

D = 4


def numbered(rows: int, first: int = 0) -> Tensor:
    """Rows that say which they are, exactly in bfloat16: row r holds r // 128 and r % 128."""
    r = torch.arange(first, first + rows)
    return torch.stack([r // 128, r % 128, torch.zeros_like(r), torch.ones_like(r)], 1).float()


def numbers(rows_ND: Tensor) -> list[int]:
    return [int(row[0]) * 128 + int(row[1]) for row in rows_ND.tolist()]


def write_capture(folder: Path, sizes: tuple[int, ...] = (300, 500, 200), per_document: int = 7) -> Path:
    folder.mkdir()
    shards, first = [], 0
    for number, size in enumerate(sizes):
        r = torch.arange(first, first + size)
        shards.append(write_shard(folder, number, numbered(size, first), r, r // per_document, r % per_document))
        first += size
    manifest = {"hook": "blocks.1.hook_resid_post", "d_in": D, "shards": shards, "done": True}
    write_json(folder / "manifest.json", {"format": FORMAT, "version": VERSION} | manifest)
    return folder


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    return write_capture(tmp_path / "a")


@pytest.mark.parametrize("mix_bytes", [1, 9000, 1 << 30])
@pytest.mark.parametrize("held_out", [None, 0.3])
def test_an_epoch_gives_every_row_once_and_a_position_always_the_same(
    capture: Path, mix_bytes: int, held_out: float | None
) -> None:
    source: Source = open_source(capture, 3, held_out=held_out, mix_bytes=mix_bytes)
    rows = source.rows
    assert source.d_in == D and source.hook == "blocks.1.hook_resid_post"
    read = numbers(torch.cat([source.batch(start, 64) for start in range(0, 2 * rows, 64)]))
    first, second = read[:rows], read[rows : 2 * rows]
    assert len(set(first)) == rows and set(second) == set(first) and first != second
    again = open_source(capture, 3, held_out=held_out, mix_bytes=mix_bytes)
    for start, size in ((rows + 17, 50), (3, 5), (rows - 20, 40), (0, rows), (rows, 1)):
        assert numbers(again.batch(start, size)) == read[start : start + size], "in any order of asking"
    assert numbers(open_source(capture, 4, held_out=held_out, mix_bytes=mix_bytes).batch(0, rows)) != first
    assert source.batch(0, 3).dtype == torch.float32


def test_what_is_held_out_is_whole_documents_that_no_batch_gives(capture: Path) -> None:
    source = open_source(capture, 0, held_out=0.3)
    kept = set(numbers(source.batch(0, source.rows)))
    held_ND = source.held_out(10_000)
    assert held_ND is not None and held_ND.dtype == torch.float32
    held = set(numbers(held_ND))
    assert not kept & held and kept | held == set(range(1000)) and len(held) == source.held_out_rows
    assert {r // 7 for r in held} == {d for d in range(143) if is_held_out(d, 0.3)}, "as `read_rows` splits the text"
    few = open_source(capture, 99, held_out=0.3).held_out(20)
    assert few is not None and torch.equal(few, held_ND[:20]), "which rows these are does not depend on the order"
    assert open_source(capture, 0).held_out(10) is None and open_source(capture, 0).rows == 1000
    with pytest.raises(TrainError, match=r"share is 1\.5"):
        open_source(capture, 0, held_out=1.5)


def test_without_documents_blocks_of_rows_are_held_out_and_a_big_file_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 4 * D * 1000)
    np.save(tmp_path / "x.npy", numbered(20 * BLOCK + 30).numpy())
    source = open_source(tmp_path, 1, held_out=0.3, mix_bytes=1 << 14)
    assert len(source.pieces) > 5
    kept, held_ND = numbers(source.batch(0, source.rows)), source.held_out(10_000)
    assert held_ND is not None
    blocks = {r // BLOCK for r in numbers(held_ND)}
    assert blocks and not blocks & {r // BLOCK for r in kept}
    assert sorted(kept + numbers(held_ND)) == list(range(20 * BLOCK + 30))
    assert source.hook == "" and source.manifest["rows"] == 20 * BLOCK + 30


def test_files_of_any_floating_point_kind_give_their_rows(tmp_path: Path) -> None:
    x_ND = numbered(600)
    save_file({"rows": x_ND[:100].bfloat16()}, tmp_path / "a.safetensors")
    save_file({"embeddings": x_ND[100:200].half(), "w": torch.ones(3, 3)}, tmp_path / "b.safetensors")
    save_file({"any name": x_ND[200:300].double(), "ids": torch.arange(100)}, tmp_path / "c.safetensors")
    np.save(tmp_path / "d.npy", x_ND[300:400].half().numpy())
    np.save(tmp_path / "e.npy", np.asfortranarray(x_ND[400:500].double().numpy()))
    np.save(tmp_path / "f.npy", x_ND[500:].numpy().astype(">f4"))
    (tmp_path / "notes.txt").write_text("not rows")
    source = open_source(tmp_path, 0)
    assert sorted(numbers(source.batch(0, 600))) == list(range(600))


def object_array(path: Path) -> None:
    np.save(path, np.array([[{"a": 1}]], dtype=object), allow_pickle=True)


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file, file.open("x.npy", "w") as member:
        buffer = io.BytesIO()
        np.save(buffer, np.ones((3, D)))
        member.write(buffer.getvalue())


def truncated(path: Path) -> None:
    np.save(path, np.ones((300, D)))
    path.write_bytes(path.read_bytes()[:500])


BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    ("z.npy", lambda path: np.save(path, np.ones((3, 5))), r"z\.npy has rows of width 5, but a\.npy has 4"),
    ("z.npy", lambda path: np.save(path, np.ones(7)), r"z\.npy has the shape \(7,\)"),
    ("z.npy", lambda path: np.save(path, np.ones((0, D))), r"z\.npy is empty"),
    ("z.npy", lambda path: np.save(path, np.ones((2, D), dtype=np.int64)), r"z\.npy holds int64"),
    ("z.npy", object_array, r"z\.npy is no \.npy file of numbers"),
    ("z.npy", archive, r"z\.npy is an archive"),
    ("z.npy", truncated, r"z\.npy is no \.npy file"),
    ("z.npy", lambda path: path.write_bytes(b""), r"z\.npy is no \.npy file"),
    ("z.safetensors", lambda path: path.write_bytes(b"rubbish"), r"z\.safetensors is no safetensors file"),
    ("z.safetensors", lambda path: save_file({"rows": torch.ones(3)}, path), r"z\.safetensors has the shape \(3,\)"),
    ("z.safetensors", lambda path: save_file({"rows": torch.ones(2, D).int()}, path), r"z\.safetensors holds I32"),
    (
        "z.safetensors",
        lambda path: save_file({"a": torch.ones(3, D), "b": torch.ones(3, D)}, path),
        r"z\.safetensors holds 2 two-dimensional tensors",
    ),
]


@pytest.mark.parametrize(("name", "write", "why"), BAD)
def test_a_file_that_cannot_be_rows_is_named(name: str, write: Callable[[Path], Any], why: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", numbered(10).numpy())
    write(tmp_path / name)
    with pytest.raises(TrainError, match=why):
        open_source(tmp_path, 0)


def test_a_folder_without_rows_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"holds no activations") as error:
        open_source(tmp_path, 0)
    assert error.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_named_by_shard_and_row_when_it_is_read(tmp_path: Path, value: float) -> None:
    folder = write_capture(tmp_path / "a")
    rows = load_file(folder / "000001.safetensors")
    rows["rows"][413, 2] = value
    save_file(rows, folder / "000001.safetensors")
    for mix_bytes in (1, 1 << 30):
        source = open_source(folder, 0, mix_bytes=mix_bytes)
        with pytest.raises(TrainError, match=rf"row 413 of .*000001\.safetensors holds {value}"):
            source.batch(0, 1000)
    held = open_source(folder, 0, held_out=0.9)
    with pytest.raises(TrainError, match=r"row 413 of"):
        (held.held_out(1000), held.batch(0, held.rows))


def test_finite_rows_whose_sum_is_not_are_fine(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((10, D), 3e38, dtype=np.float32))
    assert float(open_source(tmp_path, 0).batch(0, 1)[0, 0]) == pytest.approx(3e38)


def test_a_shard_with_fewer_rows_than_its_manifest_says_is_named(capture: Path) -> None:
    other = write_capture(capture.parent / "b", sizes=(300, 499, 200))
    (capture / "000001.safetensors").write_bytes((other / "000001.safetensors").read_bytes())
    manifest = json.loads((capture / "manifest.json").read_text())
    manifest["shards"][1]["bytes"] = (capture / "000001.safetensors").stat().st_size
    write_json(capture / "manifest.json", manifest)
    with pytest.raises(TrainError, match=r"000001\.safetensors has .*499.*500") as error:
        open_source(capture, 0).batch(0, 1000)
    assert error.value.hint and "capture" in error.value.hint


def test_the_digest_tells_data_and_split_apart_and_not_their_place(capture: Path, tmp_path: Path) -> None:
    digests = [open_source(capture, 0).digest, open_source(capture, 0, held_out=0.1).digest]
    digests.append(ShardReader(capture, 0, held_out=0.1, split_seed=1).digest)
    digests.append(open_source(write_capture(tmp_path / "b", per_document=8), 0).digest)
    digests.append(open_source(write_capture(tmp_path / "c", sizes=(500, 500)), 0).digest)
    write_plan(capture, make_plan(ShardReader(capture, 0, held_out=0.1, use_plan=False), scale="norm"))
    digests.append(open_source(capture, 0).digest)
    assert len(set(digests)) == len(digests)
    assert open_source(write_capture(tmp_path / "d"), 5).digest == digests[0]
    for name, last in (("e", 9.0), ("f", 9.0), ("g", 8.0)):
        (tmp_path / name).mkdir()
        x_ND = numbered(9)
        x_ND[-1, -1] = last
        np.save(tmp_path / name / "x.npy", x_ND.numpy())
    e, f, g = (open_source(tmp_path / name, 0).digest for name in "efg")
    assert e == f != g


def test_the_plan_decides_what_is_held_out(capture: Path) -> None:
    write_plan(capture, make_plan(ShardReader(capture, 0, held_out=0.25, split_seed=6, use_plan=False)))
    source = open_source(capture, 0)
    held_ND = source.held_out(1000)
    assert held_ND is not None
    assert {r // 7 for r in numbers(held_ND)} == {d for d in range(143) if is_held_out(d, 0.25, 6)}
    assert source.manifest["held_out"] == 0.25 and source.manifest["split_seed"] == 6
    assert open_source(capture, 0, held_out=0.25).rows == source.rows
    with pytest.raises(TrainError, match=r"holds out 0\.25 of the documents, not 0\.1"):
        open_source(capture, 0, held_out=0.1)

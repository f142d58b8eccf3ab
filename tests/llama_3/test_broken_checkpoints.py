"""Checkpoints that cannot be loaded: one sentence each, nothing executed, no other exception whatever the bytes."""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llama_3.checkpoint import load_model, state_tensors
from tests.llama_3.layouts import (
    Writer,
    finish_gguf,
    gguf_header,
    gguf_writer,
    meta_writer,
    write_bin,
    write_safetensors,
    write_sharded_bin,
)
from tests.tiny import tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = tiny_config(tied=False)
STATE = state_tensors(tiny_model(0, CONFIG))
LAYOUTS: dict[str, Writer] = {
    "safetensors": write_safetensors,
    "bin": write_bin,
    "meta": meta_writer(2),
    "gguf": gguf_writer("F32"),
}


def refused(path: Path) -> str:
    """The one sentence that loading `path` ends in."""
    with pytest.raises((ValueError, OSError)) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def remove(files: Iterable[Path]) -> None:
    for file in list(files):
        file.unlink()


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def edit_pickle(path: Path, **changes: Any) -> None:
    """Replace tensors of an archive; None takes one away."""
    tensors = {**torch.load(path, weights_only=True), **{name.replace("__", "."): t for name, t in changes.items()}}
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


class Bomb:
    """A pickle that makes a file when it is read by an unpickler that runs code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def with_code(folder: Path) -> None:
    torch.save({"model.norm.weight": Bomb(folder / "boom")}, folder / "pytorch_model.bin")


def poisoned(value: float) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in STATE.items()}
    state["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    return state


def with_integers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.norm.weight": torch.ones(32, dtype=torch.int8)}, folder / "model.safetensors")


def gguf_with(change: Callable[[gguf.GGUFWriter], None], config: Any = CONFIG) -> Writer:
    def write(folder: Path, _config: Any, _state: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        writer = gguf_header(folder / "model.gguf", config)
        writer.add_tensor("token_embd.weight", np.zeros((config.vocab_size, config.d_model), np.float32))
        change(writer)
        finish_gguf(writer, config)

    return write


EIGHT_RANKS = tiny_config(d_model=64, n_heads=8, n_kv_heads=8, d_ff=176, tied=False)
EIGHT_STATE = state_tensors(tiny_model(0, EIGHT_RANKS))

# Name: a whole checkpoint, what happens to it, and the sentence.
BROKEN: dict[str, tuple[Writer, Callable[[Path], object], str]] = {
    "code in a pickle": (
        write_bin,
        with_code,
        "holds more than tensors: it asks for .*mkdir, and nothing in it was run",
    ),
    "no tensors in a pickle": (write_bin, lambda at: torch.save([1], at / "pytorch_model.bin"), "no table of tensors"),
    "a number in a pickle": (
        write_bin,
        lambda at: torch.save({"a": 1}, at / "pytorch_model.bin"),
        "a, which is no tensor",
    ),
    "an old pickle": (
        write_bin,
        lambda at: torch.save(STATE, at / "pytorch_model.bin", _use_new_zipfile_serialization=False),
        "is no archive of torch 1.6",
    ),
    "integers in a pickle": (
        write_bin,
        lambda at: edit_pickle(at / "pytorch_model.bin", model__norm__weight=torch.ones(32, dtype=torch.int8)),
        "model.norm.weight in torch.int8",
    ),
    "a pickle cut short": (write_bin, lambda at: cut(at / "pytorch_model.bin", 0.6), "is damaged or cut short"),
    "a lost .bin shard": (
        write_sharded_bin,
        lambda at: (at / "pytorch_model-00002-of-00002.bin").unlink(),
        "there is no pytorch_model-00002-of-00002.bin in",
    ),
    "integers in safetensors": (write_safetensors, with_integers, "model.norm.weight in I8"),
    "another vocabulary": (
        write_safetensors,
        lambda at: change_json(at / "config.json", vocab_size=999),
        r"model.embed_tokens.weight .* has shape \(272, 32\) where config.json asks for \(999, 32\)",
    ),
    "a million layers": (
        write_safetensors,
        lambda at: change_json(at / "config.json", num_hidden_layers=10**9),
        "n_layers is 1000000000",
    ),
    "endless theta": (
        write_safetensors,
        lambda at: change_json(at / "config.json", rope_theta=float("inf")),
        "rope_theta inf",
    ),
    "a word as token id": (
        write_safetensors,
        lambda at: change_json(at / "config.json", eos_token_id="</s>"),
        "'</s>' is no token id",
    ),
    "another vocabulary, Meta": (
        meta_writer(2),
        lambda at: change_json(at / "params.json", vocab_size=999),
        r"tok_embeddings.weight .* has shape \(272, 32\) where params.json asks for \(999, 32\)",
    ),
    "another width, Meta": (
        meta_writer(),
        lambda at: change_json(at / "params.json", multiple_of=50),
        r"w1.weight .* has shape \(64, 32\) where params.json asks for \(100, 32\)",
    ),
    "no params.json": (meta_writer(), lambda at: (at / "params.json").unlink(), "there is no params.json in"),
    "params.json without dim": (meta_writer(), lambda at: (at / "params.json").write_text("{}"), "dim is missing"),
    "a gap between shards": (
        meta_writer(2),
        lambda at: (at / "consolidated.00.pth").unlink(),
        "there is no consolidated.00.pth in",
    ),
    "the last shard lost": (
        meta_writer(2),
        lambda at: (at / "consolidated.01.pth").unlink(),
        "there is no consolidated.01.pth in",
    ),
    "five of eight shards": (
        lambda at, _config, _state: meta_writer(8)(at, EIGHT_RANKS, EIGHT_STATE),
        lambda at: remove(at / f"consolidated.{rank:02}.pth" for rank in (5, 6, 7)),
        "there is no consolidated.05.pth in",
    ),
    "a shard cut short": (
        meta_writer(2),
        lambda at: cut(at / "consolidated.01.pth", 0.9),
        "consolidated.01.pth is damaged or cut short",
    ),
    "shards that differ": (
        meta_writer(2),
        lambda at: edit_pickle(at / "consolidated.01.pth", norm__weight=torch.ones(31)),
        "norm.weight has another shape in .*consolidated.01.pth than in consolidated.00.pth",
    ),
    "a tensor too few, Meta": (
        meta_writer(),
        lambda at: edit_pickle(at / "consolidated.00.pth", norm__weight=None),
        "lack norm.weight",
    ),
    "no embedding, Meta": (
        meta_writer(),
        lambda at: edit_pickle(at / "consolidated.00.pth", tok_embeddings__weight=None),
        "tok_embeddings.weight",
    ),
    "a bias, Meta": (
        meta_writer(),
        lambda at: edit_pickle(at / "consolidated.00.pth", layers__0__attention__wq__bias=torch.ones(32)),
        "layers.0.attention.wq.bias, which this Llama has no place for",
    ),
    "gguf cut short": (gguf_writer(), lambda at: cut(at / "model.gguf", 0.9), "is damaged or cut short"),
    "gguf of nothing": (
        gguf_writer(),
        lambda at: (at / "model.gguf").write_bytes(b"GGUF"),
        "shorter than a GGUF header",
    ),
    "no gguf": (gguf_writer(), lambda at: (at / "model.gguf").write_bytes(bytes(99)), "is no GGUF file"),
    "gguf version 1": (
        gguf_writer(),
        lambda at: (at / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQQ", 1, 0, 0, 0)),
        "has GGUF version 1",
    ),
    "two gguf files": (
        gguf_writer(),
        lambda at: shutil.copy(at / "model.gguf", at / "other.gguf"),
        "holds 2 .gguf files, model.gguf and others",
    ),
    "gguf lacks tensors": (gguf_with(lambda writer: None), lambda at: None, "lack blk.0.attn_k.weight and 18 more"),
    "gguf with experts": (gguf_with(lambda writer: writer.add_expert_count(8)), lambda at: None, "mixture of experts"),
    "gguf with yarn": (
        gguf_with(lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)),
        lambda at: None,
        "RoPE scaling 'yarn'",
    ),
    "gguf in float64": (
        gguf_with(lambda writer: writer.add_tensor("output_norm.weight", np.zeros(32))),
        lambda at: None,
        "output_norm.weight in F64, which cannot be read",
    ),
    "rope factors that do not fit": (
        gguf_with(lambda writer: writer.add_tensor("rope_freqs.weight", np.full(3, 2, np.float32))),
        lambda at: None,
        "3 RoPE factors do not fit head_dim 8",
    ),
    "an empty folder": (
        write_safetensors,
        lambda at: remove(at.iterdir()),
        "there is no model.safetensors in .* nor pytorch_model.bin, consolidated.00.pth or a .gguf file",
    ),
    **{
        f"{value} in {layout}": (
            lambda at, config, _state, write=write, value=value: write(at, config, poisoned(value)),  # type: ignore[misc]
            lambda at: None,
            r"(layers|blk).1.*(down_proj|w2|ffn_down).weight in .* holds numbers that are NaN or infinite",
        )
        for layout, write in LAYOUTS.items()
        for value in (float("nan"), float("inf"))
    },
}


@pytest.mark.parametrize(("write", "breaks", "sentence"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_checkpoint_gets_one_sentence(
    write: Writer, breaks: Callable[[Path], object], sentence: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    write(folder, CONFIG, STATE)
    breaks(folder)
    said = refused(folder)
    assert re.search(sentence, said), said
    assert not (folder / "boom").exists()


def test_weights_that_overflow_the_dtype_are_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path, CONFIG, poisoned(1e6))
    assert load_model(tmp_path, "bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"NaN or infinite in torch\.float16") as caught:
        load_model(tmp_path, "float16")
    assert caught.value.hint == "use bfloat16 or float32"  # type: ignore[attr-defined]


def test_weights_whose_sum_overflows_are_fine(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in STATE.items()}
    state["model.layers.0.mlp.up_proj.weight"][:2, :2] = 3e38
    write_safetensors(tmp_path, CONFIG, state)
    assert load_model(tmp_path).get_parameter("blocks.0.feed_forward.gate_up.weight").max() == 3e38


@pytest.mark.parametrize("name", ["model.safetensors", "notes.txt"])
def test_a_file_that_is_no_gguf_is_not_a_model(name: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path, CONFIG, STATE)
    (tmp_path / "notes.txt").write_text("hello")
    assert "is a file and no .gguf" in refused(tmp_path / name)


def test_another_architecture_in_gguf_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma3")
    finish_gguf(writer, CONFIG)
    assert "describes gemma3, and only Llama models" in refused(tmp_path)


mutations = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("random"), st.binary(max_size=300)),
    st.tuples(st.just("head"), st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=4)),
    st.tuples(st.just("tail"), st.lists(st.tuples(st.integers(1, 6000), st.integers(0, 255)), min_size=1, max_size=4)),
    st.tuples(st.just("graft"), st.tuples(st.integers(0, 200), st.binary(min_size=8, max_size=8))),
)


def mutated(data: bytes, kind: str, detail: Any) -> bytes:
    if kind == "cut":
        return data[: int(len(data) * detail)]
    if kind == "random":
        return bytes(detail)
    changed = bytearray(data)
    if kind == "graft":
        changed[detail[0] : detail[0] + 8] = detail[1]
    else:
        for place, byte in detail:
            changed[min(place, len(data) - 1) if kind == "head" else -min(place, len(data))] = byte
    return bytes(changed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {layout: tmp_path_factory.mktemp(layout) / "model" for layout in LAYOUTS}
    for layout, write in LAYOUTS.items():
        write(folders[layout], CONFIG, STATE)
    return folders


FILES = {
    "safetensors": ("model.safetensors", "config.json"),
    "bin": ("pytorch_model.bin",),
    "meta": ("consolidated.01.pth", "params.json"),
    "gguf": ("model.gguf",),
}


@pytest.mark.parametrize(("layout", "file"), [(layout, file) for layout, files in FILES.items() for file in files])
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(mutation=mutations)
def test_any_bytes_load_or_get_one_sentence(
    layout: str, file: str, mutation: tuple[str, Any], whole: dict[str, Path]
) -> None:
    path = whole[layout] / file
    data = path.read_bytes()
    try:
        path.unlink()
        path.write_bytes(mutated(data, *mutation))
        try:
            load_model(whole[layout])
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and str(error)
    finally:
        path.unlink()
        path.write_bytes(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 1 << 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@pytest.mark.parametrize(("layout", "file"), [("safetensors", "config.json"), ("meta", "params.json")])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_value_of_a_config_loads_or_gets_one_sentence(
    layout: str, file: str, data: st.DataObject, whole: dict[str, Path]
) -> None:
    path = whole[layout] / file
    text = path.read_text()
    raw = json.loads(text)
    for key in data.draw(st.lists(st.sampled_from([*sorted(raw), "rope_scaling", "model"]), min_size=1, max_size=2)):
        raw[key] = data.draw(json_values)
    try:
        path.write_text(json.dumps(raw))
        load_model(whole[layout])
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) and str(error)
    finally:
        path.write_text(text)

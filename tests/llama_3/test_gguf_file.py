"""GGUF: metadata, quantised tensors against the `gguf` package's own arithmetic, RoPE factors, ids that end a reply."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from llama_3 import checkpoint, gguf_file
from llama_3.checkpoint import load_model, parameter_sources, state_tensors, stored_dtype
from llama_3.config import ModelConfig, RopeScaling, read_config
from llama_3.gguf_file import read_metadata
from llama_3.model import Rope
from llama_3.tokenizer import gguf_metadata
from tests.llama_3.layouts import LLAMA_CPP, finish_gguf, gguf_header, gguf_writer, paired, renamed
from tests.tiny import tiny_config, tiny_model

TOKENS = torch.tensor([[1, 5, 9, 200, 3, 4]])
WIDE = tiny_config(d_model=256, n_heads=8, n_kv_heads=2, head_dim=32, d_ff=256, n_layers=1, tied=False)
"""Rows of whole K-quant blocks of 256."""


def write_random_blocks(path: Path, kind: gguf.GGMLQuantizationType) -> dict[str, Tensor]:
    """A file of random quantised blocks; its tensors as `gguf` dequantises them whole, under its own names."""
    random = np.random.default_rng(4)
    block, in_bytes = gguf.GGML_QUANT_SIZES[kind]
    writer, whole = gguf_header(path, WIDE), {}
    for name, shape in checkpoint.tensor_shapes(WIDE).items():
        own = renamed(name, LLAMA_CPP)
        if len(shape) == 1:
            whole[own] = torch.ones(shape)
            writer.add_tensor(own, np.ones(shape, np.float32))
            continue
        # Bytes below 0x3c keep every half-precision scale among them below one, and finite.
        data = random.integers(0, 0x3C, (shape[0], shape[1] // block * in_bytes)).astype(np.uint8)
        whole[own] = torch.from_numpy(gguf.quants.dequantize(data, kind))
        writer.add_tensor(own, data, raw_dtype=kind)
    finish_gguf(writer, WIDE)
    return whole


KINDS = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


@pytest.mark.parametrize("name", KINDS)
def test_quantised_tensors_are_those_of_the_gguf_package(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = gguf.GGMLQuantizationType[name]
    whole = write_random_blocks(tmp_path / "model.gguf", kind)
    monkeypatch.setattr(checkpoint, "BLOCK_NUMBERS", 256 * 48)
    assert stored_dtype(tmp_path) == torch.bfloat16
    model = load_model(tmp_path, "float32")
    for ours, sources in parameter_sources(WIDE).items():
        parts = []
        for source in sources:
            part = whole[renamed(source, LLAMA_CPP)]
            if "q_proj" in source or "k_proj" in source:
                part = checkpoint.pairs_to_halves(part, WIDE.head_dim)
            parts.append(part)
        assert torch.equal(model.get_parameter(ours), torch.cat(parts)), ours
    assert torch.isfinite(model(TOKENS)).all()


def test_eight_bits_are_nearly_the_model(tmp_path: Path) -> None:
    config = tiny_config(tied=False)
    model = tiny_model(0, config)
    gguf_writer("Q8_0")(tmp_path, config, state_tensors(model))
    loaded = load_model(tmp_path, "float32")
    assert 0 < (loaded(TOKENS) - model(TOKENS)).abs().max() < 0.1 * model(TOKENS).std()
    assert load_model(tmp_path).dtype == torch.bfloat16


def test_a_header_is_read_once_while_it_is_held_and_goes_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tied=False)
    gguf_writer("F16")(tmp_path, config, state_tensors(tiny_model(0, config)))
    read: list[Path] = []
    whole = gguf_file._read_header

    def counted(path: Path, size: int) -> gguf_file.Header:
        read.append(path)
        return whole(path, size)

    monkeypatch.setattr(gguf_file, "_read_header", counted)
    load_model(tmp_path)
    assert len(read) == 1
    held = gguf_file.hold_header(tmp_path)
    assert held is not None and len(read) == 2
    readers: list[Callable[[Path], Any]] = [read_config, load_model, stored_dtype, gguf_metadata]
    for ask in readers:
        ask(tmp_path)
    assert len(read) == 2
    words = weakref.ref(held)
    del held
    gc.collect()
    assert words() is None and not gguf_file._HELD
    assert gguf_file.hold_header(tmp_path / "elsewhere") is None


def test_a_held_header_is_read_again_when_the_file_changes(tmp_path: Path) -> None:
    config = tiny_config(tied=False)
    gguf_writer("F16")(tmp_path, config, state_tensors(tiny_model(0, config)))
    held = gguf_file.hold_header(tmp_path)
    gguf_writer("F32")(tmp_path, config, state_tensors(tiny_model(0, config)))
    assert held is not gguf_file.hold_header(tmp_path) and stored_dtype(tmp_path) == torch.float32


def test_order_of_pairs_is_undone_and_matters() -> None:
    w_QD = torch.arange(16.0)[:, None].expand(16, 3)
    halves_QD = checkpoint.pairs_to_halves(w_QD, 8)
    assert halves_QD[:8, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert torch.equal(paired("q_proj", halves_QD, tiny_config(head_dim=8)), w_QD)


def test_metadata_are_plain_values(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=300)
    writer = gguf_header(tmp_path / "model.gguf", config)
    writer.add_token_scores([0.5] * 300)
    writer.add_token_merges(["a b", "\u0120 t"])
    writer.add_chat_template("{{ messages }}")
    writer.add_array("test.bytes", [1, 2, 3])
    writer.add_array("test.nested", [[1, 2], [3]])
    writer.add_bool("test.yes", True)
    finish_gguf(writer, config)
    found = read_metadata(tmp_path / "model.gguf")
    assert found["tokenizer.ggml.tokens"][:2] == ["token 0", "token 1"] and len(found["tokenizer.ggml.tokens"]) == 300
    assert found["tokenizer.ggml.scores"] == [0.5] * 300 and found["tokenizer.ggml.merges"] == ["a b", "\u0120 t"]
    assert found["tokenizer.chat_template"] == "{{ messages }}" and found["tokenizer.ggml.bos_token_id"] == 256
    assert found["test.bytes"] == [1, 2, 3] and found["test.nested"] == [[1, 2], [3]] and found["test.yes"] is True
    assert found["llama.rope.freq_base"] == 10000.0 and found["general.architecture"] == "llama"


def write_with(path: Path, config: ModelConfig, factors: list[float] | None = None) -> None:
    """A file whose config can be read, without the tensors of its layers."""
    writer = gguf_header(path, config)
    writer.add_tensor("token_embd.weight", np.zeros((config.vocab_size, config.d_model), np.float32))
    if factors:
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    finish_gguf(writer, config)


def test_rope_factors_that_are_no_known_stretching_divide_the_frequencies(tmp_path: Path) -> None:
    config = tiny_config()
    write_with(tmp_path / "model.gguf", config, [1.0, 1.5, 2.0, 3.0])
    found = read_config(tmp_path)
    assert found.rope_scaling is None and found.rope_factors == (1.0, 1.5, 2.0, 3.0)
    expected = Rope(config).frequencies() / torch.tensor([1.0, 1.5, 2.0, 3.0])
    torch.testing.assert_close(Rope(found).frequencies(), expected)


def test_rope_factors_of_one_are_none(tmp_path: Path) -> None:
    write_with(tmp_path / "model.gguf", tiny_config(), [1.0] * 4)
    found = read_config(tmp_path)
    assert found.rope_scaling is None and found.rope_factors is None


def test_a_known_stretching_is_named(tmp_path: Path) -> None:
    config = tiny_config(rope_theta=5e5, head_dim=128, n_heads=1, n_kv_heads=1)
    for factor in (8.0, 32.0):
        scaled = tiny_config(
            rope_theta=5e5, head_dim=128, n_heads=1, n_kv_heads=1, rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192)
        )
        write_with(tmp_path / "model.gguf", scaled)
        assert read_config(tmp_path).rope_scaling == scaled.rope_scaling
    write_with(tmp_path / "model.gguf", config)
    assert read_config(tmp_path).rope_scaling is None


def test_ids_that_end_a_reply_are_all_that_the_file_names(tmp_path: Path) -> None:
    write_with(tmp_path / "model.gguf", tiny_config())
    assert read_config(tmp_path) == tiny_config()


def test_words_that_end_a_reply_are_found_in_files_too_old_to_name_them(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for key in ("embedding_length", "block_count", "feed_forward_length", "context_length"):
        writer.add_uint32(f"llama.{key}", 32)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b", "<|eot_id|>", "<|end_of_text|>"])
    writer.add_eos_token_id(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    finish_gguf(writer, tiny_config())
    found = read_config(tmp_path)
    assert found.stop_ids == (1, 3, 2) and found.bos_id == 1
    assert (found.vocab_size, found.n_kv_heads, found.head_dim, found.rope_theta) == (4, 4, 8, 10000.0)

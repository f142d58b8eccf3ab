"""One random model of each architecture, written in every layout: the same logits from all, and transformers' tokens.

Weights are rounded to float16 before anything is written, so that every layout can hold them exactly.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama_3 import checkpoint, meta, tensor_files
from llama_3.checkpoint import load_model, parameter_count, state_tensors, stored_dtype, weight_files
from llama_3.config import (
    GenerationDefaults,
    ModelConfig,
    RopeScaling,
    find_layout,
    read_config,
    read_generation_defaults,
)
from llama_3.gguf_file import find_gguf
from llama_3.model import Transformer
from tests.llama_3.layouts import (
    Writer,
    gguf_writer,
    meta_writer,
    write_bin,
    write_safetensors,
    write_sharded_bin,
    write_sharded_safetensors,
)
from tests.tiny import hf_config, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

NEW_TOKENS = 64


def variant(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = dict(vocab_size=304, d_model=64, n_heads=8, n_kv_heads=8, head_dim=8, d_ff=96, tied=False)
    return tiny_config(**{**sizes, **changes})


LLAMA_3 = dict(d_model=128, n_heads=16, d_ff=160, rope_theta=5e5, bos_id=300, stop_ids=(301, 302, 303))
SMALL_LLAMA_3 = dict(rope_theta=5e5, tied=True, n_kv_heads=2)
# Name: the config, the numbers of Meta ranks that can share its heads, and whether the embedding is sliced by width.
VARIANTS: dict[str, tuple[ModelConfig, tuple[int, ...], bool]] = {
    "llama 2": (variant(), (1, 2, 8), True),
    "tinyllama": (variant(n_kv_heads=4), (1, 2), True),
    "smollm": (variant(vocab_size=303, d_model=72, n_heads=9, n_kv_heads=3, tied=True), (1, 3), False),
    "llama 3": (variant(**LLAMA_3), (1, 2, 8), False),
    "llama 3.1": (variant(**LLAMA_3, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192)), (1, 2, 8), False),
    "llama 3.2": (variant(**SMALL_LLAMA_3, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192)), (1, 2), False),
}


def rounded_model(config: ModelConfig) -> Transformer:
    model = tiny_model(3, config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5)
            weight.copy_(weight.half())
    return model


def writers(ranks: tuple[int, ...], by_width: bool) -> dict[str, Writer]:
    return {
        "safetensors": write_safetensors,
        "sharded safetensors": write_sharded_safetensors,
        "bin": write_bin,
        "sharded bin": write_sharded_bin,
        **{f"meta {count}": meta_writer(count, by_width=by_width) for count in ranks},
        "original": meta_writer(original=True),
        "gguf f16": gguf_writer("F16"),
        "gguf f32": gguf_writer("F32"),
    }


def transformers_model(config: ModelConfig, state: dict[str, Tensor]) -> Any:
    oracle: Any = LlamaForCausalLM(LlamaConfig(**{**hf_config(config), "eos_token_id": None}))
    oracle.eval()
    missing, surplus = oracle.load_state_dict(state, strict=False)
    assert not surplus and set(missing) <= {"lm_head.weight"}
    oracle.tie_weights()
    return oracle


@torch.inference_mode()
def greedy(model: Transformer, prompts_BT: Tensor) -> Tensor:
    cache = model.new_cache(len(prompts_BT), prompts_BT.shape[1] + NEW_TOKENS)
    tokens, written = prompts_BT, []
    for _ in range(NEW_TOKENS):
        tokens = model(tokens, cache=cache, last_only=True)[:, -1].argmax(-1, keepdim=True)
        written.append(tokens)
    return torch.cat(written, 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layout_is_the_same_model_and_writes_what_transformers_writes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, ranks, by_width = VARIANTS[name]
    if config.rope_scaling and config.rope_scaling.factor == 32:  # Meta's folders say it by size alone
        monkeypatch.setattr(meta, "SCALED_BY_32", ((config.d_model, config.n_layers),))
    state = state_tensors(rounded_model(config))
    oracle = transformers_model(config, state)
    prompts_BT = torch.randint(0, config.vocab_size, (20, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = oracle(prompts_BT).logits
        said = oracle.generate(
            prompts_BT,
            attention_mask=torch.ones_like(prompts_BT),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )[:, 12:]
    assert len(set(said.flatten().tolist())) > 100, "the model says too little to tell models apart"
    first = None
    for layout, write in writers(ranks, by_width).items():
        folder = tmp_path / layout
        write(folder, config, {name: tensor.half() for name, tensor in state.items()})
        model = load_model(folder, "float32")
        logits = model(prompts_BT)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        first = logits if first is None else first
        assert torch.equal(logits, first), f"{layout} differs"
        assert torch.equal(greedy(model, prompts_BT), said), f"{layout} writes other tokens"


SMALL = variant(n_kv_heads=4, rope_theta=5e5, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), bos_id=300)


def halves(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.half() for name, tensor in state.items()}


@pytest.mark.parametrize("layout", writers((1, 2), False))
def test_blocks_of_rows_and_fresh_mappings_change_nothing(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, opened = rounded_model(SMALL), list[Path]()
    writers((1, 2), False)[layout](tmp_path / "model", SMALL, halves(state_tensors(model)))
    load_archive = tensor_files._load_archive

    def counted(path: Path) -> dict[str, Tensor]:
        opened.append(path)
        return load_archive(path)

    monkeypatch.setattr(tensor_files, "_load_archive", counted)
    monkeypatch.setattr(tensor_files, "MAPPED_BYTES", 1)
    monkeypatch.setattr(checkpoint, "BLOCK_NUMBERS", 700)
    loaded = load_model(tmp_path / "model", "float32")
    for (name, ours), (_, theirs) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert len(opened) > 20 if layout.startswith(("bin", "sharded bin", "meta", "original")) else not opened


@pytest.mark.parametrize("layout", writers((1, 2), False))
def test_what_is_known_of_every_layout_before_it_is_loaded(layout: str, tmp_path: Path) -> None:
    state = state_tensors(rounded_model(SMALL))
    writers((1, 2), False)[layout](tmp_path / "model", SMALL, halves(state))
    assert stored_dtype(tmp_path / "model") == (torch.float32 if layout == "gguf f32" else torch.float16)
    config = read_config(tmp_path / "model")
    assert parameter_count(config) == sum(tensor.numel() for tensor in state.values())
    assert (config.rope_scaling, config.rope_factors, config.tied) == (SMALL.rope_scaling, None, False)
    assert read_generation_defaults(tmp_path / "model") == GenerationDefaults()
    assert sum(file.stat().st_size for file in weight_files(tmp_path / "model")) > 2 * parameter_count(config)


@pytest.mark.parametrize("layout", ["safetensors", "meta 2", "gguf f16"])
def test_a_block_is_finished_before_the_next_is_read(layout: str, tmp_path: Path) -> None:
    writers((1, 2), False)[layout](tmp_path / "model", SMALL, halves(state_tensors(rounded_model(SMALL))))
    seen: list[tuple[int, bool]] = []
    blocks: list[torch.nn.Module] = []

    def finish(block: torch.nn.Module, layer: int) -> None:
        blocks.append(block)
        seen.append((layer, any(weight.is_meta for weight in block.parameters())))
        block.get_submodule(
            "attention"
        ).out = torch.nn.Identity()  # as a quantised product would take the place of the matrix

    model = load_model(tmp_path / "model", finish=finish)
    assert seen == [(0, False), (1, False)] and list(model.blocks) == blocks
    assert all(isinstance(block.get_submodule("attention.out"), torch.nn.Identity) for block in blocks)


def test_safetensors_come_before_bin_before_meta_before_gguf(tmp_path: Path) -> None:
    state = halves(state_tensors(rounded_model(SMALL)))
    gguf_writer()(tmp_path, SMALL, state)
    assert find_layout(tmp_path) == ("gguf", tmp_path / "model.gguf") == find_layout(tmp_path / "model.gguf")
    assert find_gguf(tmp_path) == tmp_path / "model.gguf"
    meta_writer(original=True)(tmp_path, SMALL, state)
    assert find_layout(tmp_path) == ("meta", tmp_path / "original")
    write_bin(tmp_path, SMALL, state)
    assert find_layout(tmp_path) == ("bin", tmp_path)
    write_safetensors(tmp_path, SMALL, state)
    assert find_layout(tmp_path) == ("safetensors", tmp_path)
    assert find_gguf(tmp_path) is None and find_gguf(tmp_path / "nowhere") is None
    assert load_model(tmp_path / "model.gguf").dtype == torch.float16


def test_a_tied_meta_folder_may_leave_its_head_out(tmp_path: Path) -> None:
    state = halves(state_tensors(rounded_model(SMALL)))
    meta_writer(2)(tmp_path / "model", SMALL, state)
    assert not read_config(tmp_path / "model").tied
    meta_writer(2)(tmp_path / "tied", SMALL, {name: t for name, t in state.items() if name != "lm_head.weight"})
    assert read_config(tmp_path / "tied").tied and load_model(tmp_path / "tied").head is None


# The models Meta published: dim, layers, heads, kv heads, params.json, then d_ff and context.
PUBLISHED: dict[str, tuple[tuple[int, int, int, int], dict[str, Any], int, int]] = {
    "Llama 2 7B": ((4096, 32, 32, 32), {"multiple_of": 256, "vocab_size": -1}, 11008, 4096),
    "3 8B": ((4096, 32, 32, 8), {"ffn_dim_multiplier": 1.3, "multiple_of": 1024, "rope_theta": 5e5}, 14336, 8192),
    "3 70B": ((8192, 80, 64, 8), {"ffn_dim_multiplier": 1.3, "multiple_of": 4096, "rope_theta": 5e5}, 28672, 8192),
    "3.1 405B": (
        (16384, 126, 128, 8),
        {"ffn_dim_multiplier": 1.2, "multiple_of": 4096, "rope_theta": 5e5, "use_scaled_rope": True},
        53248,
        131072,
    ),
    "3.2 1B": (
        (2048, 16, 32, 8),
        {"ffn_dim_multiplier": 1.5, "multiple_of": 256, "rope_theta": 5e5, "use_scaled_rope": True},
        8192,
        131072,
    ),
    "3.2 3B": (
        (3072, 28, 24, 8),
        {"ffn_dim_multiplier": 1.0, "multiple_of": 256, "rope_theta": 5e5, "use_scaled_rope": True},
        8192,
        131072,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_params_give_the_published_sizes(name: str) -> None:
    (dim, layers, heads, kv_heads), more, d_ff, context = PUBLISHED[name]
    vocab = 32000 if more.get("vocab_size") == -1 else 128256
    raw = {"dim": dim, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv_heads, "vocab_size": vocab, **more}
    weights: Any = SimpleNamespace(shapes={"tok_embeddings.weight": (vocab, dim)}, tied=name.startswith("3.2"))
    config = meta._model_config(raw, weights)
    assert (config.vocab_size, config.d_ff, config.max_context) == (vocab, d_ff, context)
    assert config.head_dim == {"3.2 1B": 64}.get(name, 128)
    factor = config.rope_scaling and config.rope_scaling.factor
    assert factor == {"3.1 405B": 8, "3.2 1B": 32, "3.2 3B": 32}.get(name)
    assert (config.bos_id, config.stop_ids) == ((1, (2,)) if vocab == 32000 else (128000, (128001, 128008, 128009)))

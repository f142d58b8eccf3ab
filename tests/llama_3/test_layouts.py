"""One random model of each architecture, written in every layout: the same logits from all, and transformers' tokens.

Weights are rounded to float16 before anything is written, so that every layout can hold them exactly.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama_3 import meta
from llama_3.checkpoint import load_model, state_tensors
from llama_3.config import ModelConfig, RopeScaling
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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from more, and the machine may be busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def transformers_model(config: ModelConfig, state: dict[str, Tensor]) -> LlamaForCausalLM:
    oracle = LlamaForCausalLM(LlamaConfig(**{**hf_config(config), "eos_token_id": None})).eval()
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

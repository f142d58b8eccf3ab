"""Small real things for tests: a random two-layer Llama, a byte tokenizer, and both as a folder on disk."""

import base64
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llama_3.checkpoint import state_tensors
from llama_3.config import ModelConfig
from llama_3.model import Transformer
from llama_3.tokenizer_tiktoken import TiktokenTokenizer
from llama_3.vocabulary import special_names

N_SPECIALS = 16


def byte_ranks() -> dict[bytes, int]:
    """The 256 single bytes, each its own rank."""
    return {bytes([byte]): byte for byte in range(256)}


def byte_tokenizer() -> TiktokenTokenizer:
    """256 byte tokens, then Llama 3's first 16 special tokens (begin_of_text is 256, eot_id 265)."""
    specials = {name: 256 + offset for offset, name in enumerate(special_names()[:N_SPECIALS])}
    return TiktokenTokenizer(byte_ranks(), specials)


def tiny_config(**changes: Any) -> ModelConfig:
    """Two layers, d_model 32, four query heads on two key-value heads, the byte tokenizer's vocabulary."""
    sizes: dict[str, Any] = dict(
        vocab_size=256 + N_SPECIALS, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=64,
        norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None, max_context=256, tied=True, bos_id=256,
        stop_ids=(257, 264, 265),
    )  # fmt: skip
    return ModelConfig(**{**sizes, **changes})


def tiny_model(seed: int = 0, config: ModelConfig | None = None) -> Transformer:
    """A float32 Llama with random frozen weights, wide enough for its logits to differ clearly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(config or tiny_config())
        model.initialise(std=0.2)
    return model.eval().requires_grad_(False)


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a tiny model."""
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        },
        "max_position_embeddings": config.max_context,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.stop_ids),
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }


def write_tiny_checkpoint(folder: Path, seed: int = 0, config: ModelConfig | None = None) -> Transformer:
    """Write `tiny_model(seed)` and the byte tokenizer to `folder` in Hugging Face layout; the model comes back."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(seed, config)
    save_file(state_tensors(model), str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(hf_config(model.config)))
    lines = [base64.b64encode(piece) + b" %d\n" % rank for piece, rank in byte_ranks().items()]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return model

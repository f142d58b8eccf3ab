"""Writers of every layout people keep checkpoints in, from one state dict under Hugging Face names.

They follow the makers' conventions (Meta's llama-models, llama.cpp's converter), so that a checkpoint here differs from
a published one only in size. They share no code with the loader: names and the order of query and key rows are written
out once more.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from llama_3.config import ModelConfig
from tests.tiny import hf_config

State = Mapping[str, Tensor]
Writer = Callable[[Path, ModelConfig, State], None]

META = {
    "input_layernorm": "attention_norm", "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
}  # fmt: skip
LLAMA_CPP = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
}  # fmt: skip


def renamed(name: str, table: Mapping[str, str]) -> str:
    for theirs, ours in table.items():
        name = name.replace(theirs, ours)
    return name


def paired(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Query and key rows from halves to neighbouring pairs, row by row; other tensors as they are."""
    if "q_proj" not in name and "k_proj" not in name:
        return tensor
    half = config.head_dim // 2
    within = [part * half + pair for pair in range(half) for part in (0, 1)]
    heads = tensor.shape[0] // config.head_dim
    return tensor[[head * config.head_dim + row for head in range(heads) for row in within]]


def write_config(folder: Path, config: ModelConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(config)))


def _halved(state: State) -> list[dict[str, Tensor]]:
    names = sorted(state)
    return [{name: state[name] for name in part} for part in (names[::2], names[1::2])]


def write_safetensors(folder: Path, config: ModelConfig, state: State) -> None:
    write_config(folder, config)
    save_file(dict(state), folder / "model.safetensors")


def write_sharded_safetensors(folder: Path, config: ModelConfig, state: State) -> None:
    write_config(folder, config)
    _write_shards(folder, state, "model-{}.safetensors", "model.safetensors.index.json", save_file)


def write_bin(folder: Path, config: ModelConfig, state: State) -> None:
    write_config(folder, config)
    torch.save(dict(state), folder / "pytorch_model.bin")


def write_sharded_bin(folder: Path, config: ModelConfig, state: State) -> None:
    write_config(folder, config)
    _write_shards(folder, state, "pytorch_model-{}.bin", "pytorch_model.bin.index.json", torch.save)


def _write_shards(folder: Path, state: State, pattern: str, index: str, save: Callable[[Any, Path], None]) -> None:
    weight_map = {}
    for number, part in enumerate(_halved(state), 1):
        file = pattern.format(f"{number:05}-of-00002")
        save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def meta_params(config: ModelConfig) -> dict[str, Any]:
    """`params.json` whose formula for the feed-forward gives the config's d_ff."""
    plain = int(8 * config.d_model / 3)
    return {
        "dim": config.d_model, "n_layers": config.n_layers, "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads, "vocab_size": config.vocab_size, "multiple_of": config.d_ff,
        "ffn_dim_multiplier": min(1.0, config.d_ff / plain), "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta, "use_scaled_rope": config.rope_scaling is not None,
    }  # fmt: skip


def meta_writer(ranks: int = 1, *, by_width: bool = False, original: bool = False) -> Writer:
    """Meta's layout in so many files; `by_width` slices the embedding as Llama 2 does; `original` nests the folder."""

    def write(folder: Path, config: ModelConfig, state: State) -> None:
        folder = folder / "original" if original else folder
        folder.mkdir(parents=True)
        (folder / "params.json").write_text(json.dumps(meta_params(config)))
        whole = {renamed(name, META): paired(name, tensor, config) for name, tensor in state.items()}
        for rank in range(ranks):
            shard = {name: _slice(name, tensor, rank, ranks, by_width).clone() for name, tensor in whole.items()}
            if config.tied:  # as in Llama 3.2: two names for one storage
                shard["output.weight"] = shard["tok_embeddings.weight"]
            shard["rope.freqs"] = torch.ones(config.head_dim // 2)
            torch.save(shard, folder / f"consolidated.{rank:02}.pth")

    return write


def _slice(name: str, tensor: Tensor, rank: int, ranks: int, by_width: bool) -> Tensor:
    if tensor.dim() == 1:
        return tensor
    wide = name.endswith(("wo.weight", "w2.weight")) or (by_width and name == "tok_embeddings.weight")
    return tensor.chunk(ranks, 1 if wide else 0)[rank]


def rope_freqs(config: ModelConfig) -> np.ndarray[Any, Any]:
    """What llama.cpp divides each frequency by, in its converter's steps."""
    scaling = config.rope_scaling
    assert scaling is not None
    factors = []
    for at in range(0, config.head_dim, 2):
        length = 2 * math.pi * config.rope_theta ** (at / config.head_dim)
        if length < scaling.original_context / scaling.high_freq_factor:
            factors.append(1.0)
        elif length > scaling.original_context / scaling.low_freq_factor:
            factors.append(scaling.factor)
        else:
            smooth = (scaling.original_context / length - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)


def gguf_writer(kind: str = "F16", *, name: str = "model.gguf") -> Writer:
    """llama.cpp's layout: matrices in `kind`, norms in float32, query and key rows in pairs."""

    def write(folder: Path, config: ModelConfig, state: State) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        writer = gguf_header(folder / name, config)
        qtype = gguf.GGMLQuantizationType[kind]
        for theirs, tensor in state.items():
            numbers = paired(theirs, tensor, config).float().numpy()
            own = renamed(theirs, LLAMA_CPP)
            if numbers.ndim == 1:
                writer.add_tensor(own, numbers)
            else:
                writer.add_tensor(own, gguf.quants.quantize(numbers, qtype), raw_dtype=qtype)
        finish_gguf(writer, config)

    return write


def gguf_header(path: Path, config: ModelConfig) -> gguf.GGUFWriter:
    """A writer that has been told the sizes and a vocabulary of the right length."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {index}" for index in range(config.vocab_size)])
    writer.add_bos_token_id(config.bos_id)
    add_stops = writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id
    for add, token in zip(add_stops, config.stop_ids, strict=False):
        add(token)
    return writer


def finish_gguf(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """Add the frequencies of a scaled RoPE, and write the file."""
    if config.rope_scaling is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

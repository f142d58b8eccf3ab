"""What a comparison costs over a single reply: baseline, steered and its shadow are rows of one batch.

    python benchmarks/compare.py                  # the shipped model
    python benchmarks/compare.py --model 1b       # random weights in the shape of Llama 3.2 1B, bfloat16 (3 GB)

Single replies and comparisons of one prompt, edit and seed take turns, each with the weights as its command loads them:
a comparison's are packed for several rows. Prints one JSON line for each with the median and best of its seconds, and
the ratio to a single reply.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import torch

from llama_3.config import ModelConfig
from llama_3.model import Transformer
from llama_3.packed import pack_model
from llama_3.tokenizer import load_tokenizer
from sae.model import SAE, SAEConfig
from steer.config import DEMO_MODEL
from steer.edits import Edit, SteeringSet
from steer.engine import Engine
from steer.session import Prompt, Sampling


def one_billion(many: bool) -> Engine:
    """Llama 3.2 1B's shape with the demo's tokenizer; only that tokenizer's words are ever the likeliest."""
    config = ModelConfig(
        vocab_size=128256, d_model=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, d_ff=8192, norm_eps=1e-5,
        rope_theta=500000.0, rope_scaling=None, max_context=2048, tied=True, bos_id=0, stop_ids=(),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config).to(torch.bfloat16).eval().requires_grad_(False)
    tokenizer = load_tokenizer(DEMO_MODEL)
    model.embedding_VD[tokenizer.vocab_size :] = 0
    if many:
        pack_model(model)
    sae = SAE(SAEConfig(config.d_model, 32768, "topk", 32, "blocks.9.hook_resid_post"))
    sae.W_enc_FD.normal_(std=0.03)
    sae.W_dec_FD.normal_(std=0.03)
    return Engine(model, tokenizer, sae)


def seconds(engine: Engine, prompt: Prompt, sets: Sequence[SteeringSet], watch: Sequence[int], tokens: int) -> float:
    """Wall time of the replies, one a set; those in `watch` are measured against the unsteered model."""
    start = time.perf_counter()
    rows, stops = len(sets), Sampling(0.0, logit_bias=tuple((token, -1e6) for token in engine.tokenizer.stop_ids))
    for _ in engine.stream([prompt] * rows, sets, sampling=stops, seeds=[0] * rows, max_tokens=tokens, watch=watch):
        pass
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("demo", "1b"), default="demo")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    one, many = (
        Engine.load(threads=arguments.threads, many=many) if arguments.model == "demo" else one_billion(many)
        for many in (False, True)
    )
    plain, pushed = SteeringSet(), SteeringSet((Edit.parse("5 +20 on generated"),))
    prompt = Prompt(text="Once upon a time there was a little dog who wanted to see the sea.")
    ways = {
        "single": (one, [pushed], []),
        "single, packed": (many, [pushed], []),
        "compare": (many, [plain, pushed], [1]),
        "compare, spliced": (many, [plain, pushed, SteeringSet(error="drop")], [1, 2]),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(arguments.rounds + 1):
        for name, (engine, sets, watch) in ways.items():
            spent = seconds(engine, prompt, sets, watch, arguments.tokens)
            if number:
                taken[name].append(spent)
    single = statistics.median(taken["single"])
    for name, values in taken.items():
        median = statistics.median(values)
        print(
            json.dumps({
                "what": name, "model": arguments.model, "tokens": arguments.tokens, "threads": arguments.threads,
                "dtype": one.info.dtype, "median_s": round(median, 4), "best_s": round(min(values), 4),
                "ratio": round(median / single, 3),
            })
        )  # fmt: skip


if __name__ == "__main__":
    main()

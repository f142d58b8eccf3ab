"""What a changed steering set costs in the middle of a chat: the layers above the hook, run again for what was said.

    python benchmarks/resteer.py                     # a random Llama of 0.3 B parameters, hook at three quarters
    python benchmarks/resteer.py --model demo        # the shipped model

Three ways to a chat that is read take turns: reading the whole chat (a fresh engine's way), the same chat with
another set (only the layers above the hook), and the same chat with the same set (only what is new). Prints one JSON
line for each with the median and best of its seconds, and the ratio to the whole reading.
"""

import argparse
import json
import statistics
import time

import torch

from llama_3.config import ModelConfig
from llama_3.model import Transformer
from llama_3.tokenizer import load_tokenizer
from sae.model import SAE, SAEConfig
from steer.config import DEMO_MODEL
from steer.edits import Edit, SteeringSet
from steer.engine import Engine
from steer.events import PromptRead
from steer.session import Prompt, Sampling


def random_engine(latents: int) -> Engine:
    """16 layers of width 1,024 in float32 with the demo's vocabulary, and an SAE after block 11 of 0 to 15."""
    config = ModelConfig(
        vocab_size=4096, d_model=1024, n_layers=16, n_heads=16, n_kv_heads=4, head_dim=64, d_ff=4096, norm_eps=1e-5,
        rope_theta=500000.0, rope_scaling=None, max_context=4096, tied=True, bos_id=0, stop_ids=(),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config).eval().requires_grad_(False)
    sae = SAE(SAEConfig(config.d_model, latents, "topk", 32, "blocks.11.hook_resid_post"))
    sae.W_enc_FD.normal_(std=0.03)
    sae.W_dec_FD.normal_(std=0.03)
    return Engine(model, load_tokenizer(DEMO_MODEL), sae)


def demo_engine(latents: int) -> Engine:
    """The shipped model with a random SAE after block 5 of 0 to 7: the shipped SAE reads below three quarters."""
    shipped = Engine.load(dtype="float32")
    d_model = shipped.model.config.d_model
    torch.manual_seed(0)
    sae = SAE(SAEConfig(d_model, latents, "topk", 32, "blocks.5.hook_resid_post"))
    sae.W_enc_FD.normal_(std=0.05)
    sae.W_dec_FD.normal_(std=0.05)
    return Engine(shipped.model, shipped.tokenizer, sae)


def reading(engine: Engine, prompt: Prompt, steering: SteeringSet) -> float:
    """Seconds from the question until the model has read it, its features too, and has drawn the first token."""
    start = time.perf_counter()
    stream = engine.stream([prompt], lambda: steering, sampling=Sampling(0.0), seeds=[0], max_tokens=2, reuse=True)
    assert isinstance(next(stream), PromptRead)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("random", "demo"), default="random")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    engine = (random_engine if arguments.model == "random" else demo_engine)(arguments.latents)
    words = "the cat sat on a mat and saw the dog run to the big red house by the sea "
    text = words * arguments.tokens
    ids = engine.tokenizer.encode(text)[: arguments.tokens - 1]
    prompt = Prompt(text=engine.tokenizer.decode(ids))
    sets = [SteeringSet((Edit.parse(f"{latent} +2"),)) for latent in (3, 4)]
    seconds: dict[str, list[float]] = {"whole": [], "resteered": [], "same set": []}
    for number in range(arguments.rounds + 2):
        list(engine.stream([Prompt(text="x")], lambda: sets[0], seeds=[0], max_tokens=1, reuse=True))  # forget
        measured = {
            "whole": reading(engine, prompt, sets[0]),
            "resteered": reading(engine, prompt, sets[1]),
            "same set": reading(engine, prompt, sets[1]),
        }
        if number >= 2:
            for name, value in measured.items():
                seconds[name].append(value)
    whole = statistics.median(seconds["whole"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            json.dumps({
                "what": name, "model": arguments.model, "tokens": len(ids) + 1, "layers": engine.model.config.n_layers,
                "hook": str(engine.info.hook), "threads": torch.get_num_threads(), "median_s": round(median, 4),
                "best_s": round(min(values), 4), "ratio": round(median / whole, 3),
            })
        )  # fmt: skip


if __name__ == "__main__":
    main()

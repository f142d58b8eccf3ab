"""How fast we write tokens, beside transformers `generate`: same weights, same dtype, same prompts, one run.

    python -m benchmarks.decode                # a random-weight model of Llama 3.2 1B's shape, about 20 minutes
    python -m benchmarks.decode --model demo   # the shipped model
    python -m benchmarks.decode --shape tiny   # a minute: does it still run?

Cases: `prefill` (512 tokens read), `b1` and `b8` (1 and 8 rows: 64 tokens after a prompt of 128, greedy, from one token
known to the next). `plain` is the model alone; `watched` has an SAE at a hook with the hits and five alternatives of
every token turned into the events a screen gets, and one edit at work; the peer's `watched` is a forward hook with the
same SAE. Ours come in the checkpoint's dtype and quantised: `int8` all blocks and the head, `int8-above` with the
blocks up to the hook left alone, `int4` all blocks with an int8 head.

Every implementation lives in a process of its own and they take turns, A B A B. A case is warmed up twice with little
work and timed `--rounds` times, less often (but twice) when that takes one implementation longer than `--patience`
seconds. Peak memory is that of the process above what it had with torch imported. The bound is what must be read per
token at the rate `torch.mv` reads in the same run, or for prefill what must be multiplied at the best matrix product's.
The peer's environment is made from peers.txt; `--peer-python` names one that is there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.decode_workers import MODES, ROWS

HERE = Path(__file__).resolve().parent
PROMPT, LONG, NEW = 128, 512, 64
SHAPES: dict[str, dict[str, Any]] = {
    "1b": dict(layers=16, d=2048, heads=32, kv=8, f=8192, vocab=128256, latents=32768, k=64, hook=10),
    "tiny": dict(layers=4, d=256, heads=4, kv=2, f=512, vocab=2048, latents=2048, k=16, hook=2),
}
GROUPS = (
    ("transformers", "ours", "ours-int8", "ours-int8-above", "ours-int4"),
    ("transformers-float32", "ours-float32"),
)


# -- the model --------------------------------------------------------------------------------------------------------


def make_model(folder: Path, shape: dict[str, Any]) -> None:
    """Write a random-weight bf16 checkpoint in Hugging Face layout, a tokenizer for it and an SAE."""
    import base64

    import torch
    from safetensors.torch import save_file

    from sae.checkpoint import save_sae
    from sae.model import SAE, SAEConfig

    if (folder / "sae" / "cfg.json").exists():
        return
    (folder / "model").mkdir(parents=True, exist_ok=True)
    d, f, n = shape["d"], shape["f"], shape["d"] // shape["heads"]
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, std: float = 0.02) -> torch.Tensor:
        return torch.randn(*size, generator=generator).mul_(std).bfloat16()

    weights = {"model.embed_tokens.weight": random(shape["vocab"], d), "model.norm.weight": torch.ones(d).bfloat16()}
    # The special tokens are never the likeliest, so that no reply ends before its time.
    weights["model.embed_tokens.weight"][-256:] *= 0.1
    for layer in range(shape["layers"]):
        name = f"model.layers.{layer}."
        weights |= {name + f"{norm}_layernorm.weight": torch.ones(d).bfloat16() for norm in ("input", "post_attention")}
        sizes = {"q": (shape["heads"] * n, d), "k": (shape["kv"] * n, d), "v": (shape["kv"] * n, d), "o": (d, d)}
        weights |= {name + f"self_attn.{part}_proj.weight": random(*size) for part, size in sizes.items()}
        weights |= {name + f"mlp.{part}_proj.weight": random(f, d) for part in ("gate", "up")}
        weights[name + "mlp.down_proj.weight"] = random(d, f)
    save_file(weights, str(folder / "model" / "model.safetensors"), metadata={"format": "pt"})
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=shape["vocab"], hidden_size=d,
        intermediate_size=f, num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"], head_dim=n, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=500000.0,
        max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=shape["vocab"] - 256,
        eos_token_id=shape["vocab"] - 255, torch_dtype="bfloat16",
    )  # fmt: skip
    (folder / "model" / "config.json").write_text(json.dumps(config))
    # Every byte is a token, and words that no prompt has: a letter is a token, and any token has a text.
    words = [bytes([byte]) for byte in range(256)] + [b" w%d" % i for i in range(shape["vocab"] - 512)]
    lines = [base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(words)]
    (folder / "model" / "tokenizer.model").write_bytes(b"".join(lines))
    hook = f"blocks.{shape['hook']}.hook_resid_post"
    sae = SAE(SAEConfig(d, shape["latents"], "topk", shape["k"], hook), dtype=torch.bfloat16)
    directions = torch.randn(shape["latents"], d, generator=generator)
    sae.W_dec_FD.data.copy_(directions / directions.norm(dim=1, keepdim=True))
    sae.W_enc_FD.data.copy_(sae.W_dec_FD)
    save_sae(folder / "sae", sae)


# -- the run ----------------------------------------------------------------------------------------------------------


class Worker:
    """An implementation in its own process."""

    def __init__(self, name: str, python: str, model: Path, sae: Path, threads: int) -> None:
        self.name = name
        command = [python, str(HERE / "decode_workers.py"), name, "--model", str(model), "--sae", str(sae)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        if name.startswith("ours"):
            environment["PYTHONPATH"] = str(HERE.parent)
        self.process = subprocess.Popen(
            [*command, "--threads", str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        self.born = self._answer()

    def ask(self, do: str, **order: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do} | order) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def peer_python(folder: Path) -> str:
    """The interpreter of an environment with the peers in it, made where there is none."""
    python = folder / "peers" / "bin" / "python"
    if not python.exists():
        print("installing the peers of benchmarks/peers.txt", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder / "peers")], check=True)
        pins = ["-c", str(HERE.parent / "constraints.txt"), "-r", str(HERE / "peers.txt")]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *pins], check=True)
    return str(python)


def measure(workers: list[Worker], lengths: dict[str, int], new: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Let the workers take turns at every case; one dictionary per worker, case and mode."""
    results = []
    for case, rows in ROWS.items():
        for mode in MODES:
            if case not in args.cases.split(","):
                continue
            sizes = {"length": lengths[case], "new": new}
            for _ in range(2):
                for worker in workers:
                    warm = {"length": 32, "new": 1} if case == "prefill" else sizes | {"new": 2}
                    worker.ask("run", case=case, mode=mode, **warm)
            times: dict[str, list[float]] = {worker.name: [] for worker in workers}
            for _ in range(args.rounds):
                for worker in workers:
                    taken = times[worker.name]
                    if len(taken) < 2 or sum(taken) < args.patience:
                        taken.append(worker.ask("run", case=case, mode=mode, **sizes))
            made = lengths[case] if case == "prefill" else rows * new
            for worker in workers:
                rates = sorted(made / seconds for seconds in times[worker.name])
                line = {"what": case, "mode": mode, "who": worker.name, "rows": rows, "prompt": lengths[case],
                        "new": 0 if case == "prefill" else new, "tok_s_median": round(statistics.median(rates), 2),
                        "tok_s_best": round(rates[-1], 2), "runs": len(rates)}  # fmt: skip
                print(f"  {case} {mode} {worker.name}: {line['tok_s_median']} tokens/s", file=sys.stderr, flush=True)
                results.append(line)
    return results


def run_group(names: list[str], folder: Path, sae: Path, python: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Start the workers one after another, measure them in turns and end them; one line per worker."""
    workers = [
        Worker(name, sys.executable if name.startswith("ours") else python, folder, sae, args.threads)
        for name in names
    ]  # fmt: skip
    ours = next(worker for worker in workers if worker.name.startswith("ours"))
    context = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    lengths = {"prefill": min(LONG, context - NEW), "b1": PROMPT, "b8": PROMPT}
    for key in {(1, 32), *((rows, lengths[case]) for case, rows in ROWS.items())}:
        tokens = ours.ask("prompts", count=key[0], length=key[1])
        for worker in workers:
            if not worker.name.startswith("ours"):
                worker.ask("tokens", key=f"{key[0]}x{key[1]}", tokens=tokens)
    cases = measure(workers, lengths, NEW, args)
    agreement = agree(workers, lengths["b1"], folder)
    lines = []
    for worker in workers:
        mine = [{k: v for k, v in line.items() if k != "who"} for line in cases if line["who"] == worker.name]
        facts = worker.ask("facts", length=lengths["prefill"]) if worker.name.startswith("ours") else {}
        lines.append({"who": worker.name, "threads": args.threads, **worker.born, "peak_gb": worker.ask("peak"),
                      **agreement.get(worker.name, {}), "facts": facts, "cases": mine})  # fmt: skip
    for worker in workers:
        worker.close()
    for line in lines:
        print(json.dumps(line), flush=True)
    return lines


def agree(workers: list[Worker], length: int, folder: Path) -> dict[str, dict[str, float]]:
    """How far the logits after one prompt are from the first worker's: a fast wrong answer is none."""
    import torch

    logits = {}
    for worker in workers:
        file = folder.parent / f"logits-{os.getpid()}.pt"
        worker.ask("logits", length=length, file=str(file))
        logits[worker.name] = torch.load(file, weights_only=True).double()
        file.unlink()
    first = logits[workers[0].name]
    return {
        name: {
            "logits_off": round(float((mine - first).norm() / first.norm()), 6),
            "kl": float((first.softmax(0) * (first.log_softmax(0) - mine.log_softmax(0))).sum()),
        }
        for name, mine in logits.items()
    }


def table(lines: list[dict[str, Any]]) -> None:
    """What was measured, beside the peer's plain run of the same group and the machine's bound."""
    rates = {
        (line["who"], case["what"], case["mode"]): case["tok_s_median"] for line in lines for case in line["cases"]
    }
    print(f"\n{'':22}{'case':>18}{'tokens/s':>10}{'best':>9}{'runs':>5}{'x peer':>8}{'watching':>10}{'bound':>9}")
    for line in lines:
        peer = "transformers-float32" if line["who"].endswith("float32") else "transformers"
        for case in line["cases"]:
            what, mode, rate = case["what"], case["mode"], case["tok_s_median"]
            against = rates.get((peer, what, "plain"))
            plain, bound = rates.get((line["who"], what, "plain")), ""
            if facts := line["facts"]:
                stream = facts["stream_gb_s"] * 1e9 / facts[mode] * case["rows"]
                bound = f"{case['prompt'] / facts['prefill_s'] if what == 'prefill' else stream:.1f}"
            print(f"{line['who']:22}{what + ' ' + mode:>18}{rate:10.2f}{case['tok_s_best']:9.2f}{case['runs']:5}"
                  f"{f'{rate / against:.2f}' if against else '':>8}"
                  f"{f'{rate / plain - 1:+.0%}' if mode == 'watched' and plain else '':>10}{bound:>9}")  # fmt: skip
    print(f"\n{'':22}{'ready after s':>14}{'peak GB':>9}{'logits off':>12}{'KL, nats':>11}")
    for line in lines:
        print(
            f"{line['who']:22}{line['ready_s']:14.1f}{line['peak_gb']:9.2f}{line['logits_off']:12.2e}{line['kl']:11.1e}"
        )
    print(
        "\nx peer: beside transformers plain in the same dtype. bound: weights read once at the rate of torch.mv (for 8"
    )
    print("rows as well); for prefill the blocks' multiplications at the rate of the quickest matrix product.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens per second beside transformers, on this machine")
    parser.add_argument("--model", default="random", help="demo, random, or a Hugging Face folder (needs --sae)")
    parser.add_argument("--sae", type=Path, help="SAE folder for a --model of your own")
    parser.add_argument("--shape", choices=SHAPES, default="1b", help="shape of the random model")
    parser.add_argument("--folder", type=Path, help="where model and peers are made, and stay")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=20.0, help="seconds for one implementation's timed runs")
    parser.add_argument("--cases", default=",".join(ROWS))
    parser.add_argument("--only", help="implementations, separated by commas")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--peer-python", help="interpreter with torch and transformers, instead of making one")
    args = parser.parse_args()
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        model, sae = folder / "model", folder / "sae"
        if args.model == "demo":
            model, sae = (HERE.parent / "steer" / "demo" / part for part in ("model", "sae"))
        elif args.model == "random":
            make_model(folder, SHAPES[args.shape])
        else:
            model, sae = Path(args.model).resolve(), args.sae.resolve()
        python = args.peer_python or peer_python(folder)
        lines = []
        for group in GROUPS:
            names = [name for name in group if not args.only or name in args.only.split(",")]
            if any(name.startswith("ours") for name in names):
                lines += run_group(names, model, sae, python, args)
        table(lines)


if __name__ == "__main__":
    main()

"""How fast we capture residuals, written to disk meanwhile, beside transformers and nnsight: same weights, one run.

    python -m benchmarks.capture            # random weights of Llama 3.2 1B's shape, after layer 8; about 15 minutes
    python -m benchmarks.capture --quick    # a minute: does it still run?

Everyone reads the same 32 rows of 128 random tokens in bfloat16 and has the residual after `--layer` blocks of every
token. `hidden` is transformers with `output_hidden_states`, `hidden-base` that without the head, `hook-stop` a forward
hook that raises (in float32 too, which is faster on CPUs without bfloat16), `nnsight` a trace that stops. `ours` keeps
nothing, as they do; `ours-disk` hands every row to the writer, which makes hashed shards in the background, and a round
ends when the last byte is written.

Every implementation lives in a process of its own and they take turns; a round is `--batches` batches, `--rounds` are
timed after two of one batch. `off` is the distance of the residuals from the first one's, over their norm. The bound is
what must be multiplied in the blocks that run, at the best matrix product's rate in the same run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NAMES = ("hidden", "hidden-base", "hook-stop", "hook-stop-float32", "nnsight", "ours", "ours-disk")
BORN = time.perf_counter()


# -- the implementations: what a worker process does ------------------------------------------------------------------


class Ours:
    """`run_batch` and, with `disk`, the writer of `steer capture`."""

    def __init__(self, args: argparse.Namespace) -> None:
        from llama_3.checkpoint import load_model
        from train.capture import parse_points

        self.model, self.disk, self.shards = load_model(args.model), args.worker == "ours-disk", Path(args.shards)
        self.points = parse_points(self.model, [f"blocks.{args.layer - 1}.hook_resid_post"])

    def run(self, batches: list[Any]) -> Any:
        import torch

        from train.capture import Batch, run_batch
        from train.shards import Background, ShardWriter

        what = {"hook": str(self.points[0]), "d_in": self.model.config.d_model, "shard_bytes": 32 << 20}
        with tempfile.TemporaryDirectory(dir=self.shards) as folder:
            with Background() as background:  # at its end all is on disk
                writer = ShardWriter(Path(folder), what, 1 << 40, background)
                for number, tokens_BT in enumerate(batches):
                    B, T = tokens_BT.shape
                    batch = Batch(tokens_BT, [T] * B, torch.ones(B, T, dtype=torch.bool), torch.arange(B))
                    (rows_ND,), kept_NT = run_batch(self.model, batch, self.points)
                    if self.disk:
                        documents_N = batch.documents_at(kept_NT)
                        writer.add(number, (rows_ND, documents_N, kept_NT[:, 1], tokens_BT.flatten()))
                if self.disk:
                    writer.finish(len(batches))
            self.written = sum(shard["bytes"] for shard in writer.shards)
        return rows_ND


class Transformers:
    """The ways people capture with transformers, and nnsight on top of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        transformers: Any = import_module("transformers")
        self.torch, self.way, self.layer = torch, args.worker.removesuffix("-float32"), args.layer
        dtype = torch.float32 if args.worker.endswith("-float32") else torch.bfloat16
        self.model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
        if self.way == "hook-stop":
            self.model.model.layers[self.layer - 1].register_forward_hook(self._stop)
        if self.way == "nnsight":
            from tokenizers import Tokenizer, models

            nnsight: Any = import_module("nnsight")
            words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a")
            self.traced = nnsight.LanguageModel(self.model, tokenizer=tokenizer)

    class Stop(Exception):  # noqa: N818 (a way out, not an error)
        """Carries the residual out of the forward pass."""

    def _stop(self, module: Any, inputs: Any, output: Any) -> None:
        raise self.Stop(output[0] if isinstance(output, tuple) else output)

    def _one(self, tokens_BT: Any) -> Any:
        if self.way == "nnsight":
            with self.traced.trace(tokens_BT) as tracer:
                output = self.traced.model.layers[self.layer - 1].output.save()
                tracer.stop()
            return output[0] if isinstance(output, tuple) else output
        if self.way == "hook-stop":
            try:
                self.model.model(input_ids=tokens_BT, use_cache=False)
            except self.Stop as reached:
                return reached.args[0]
        body = self.model if self.way == "hidden" else self.model.model
        return body(input_ids=tokens_BT, output_hidden_states=True, use_cache=False).hidden_states[self.layer]

    def run(self, batches: list[Any]) -> Any:
        with self.torch.inference_mode(self.way != "nnsight"), self.torch.no_grad():
            for tokens_BT in batches:
                resid_BTD = self._one(tokens_BT)
        return resid_BTD.flatten(0, 1)


def work(args: argparse.Namespace) -> None:
    """Answers one JSON line with another until the input ends."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
    import torch

    torch.set_num_threads(args.threads)
    status, peak = Path("/proc/self/status"), 0

    def memory(key: str) -> int:
        lines = status.read_text().splitlines() if status.exists() else []
        return next((int(line.split()[1]) for line in lines if line.startswith(key)), 0)

    before = memory("VmRSS")
    worker: Any = (Ours if args.worker.startswith("ours") else Transformers)(args)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randint(5, args.vocab - 300, (args.rows, args.tokens), generator=generator) for _ in range(2)]
    answer: Any = {"ready_s": round(time.perf_counter() - BORN, 1), "torch": torch.__version__}
    while True:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return
        order = json.loads(line)
        if "batches" in order:
            began = time.perf_counter()
            rows_ND = worker.run([given[i % 2] for i in range(order["batches"])])
            answer = {"seconds": time.perf_counter() - began, "bytes": getattr(worker, "written", 0)}
            peak = max(peak, memory("VmHWM"))
            if "file" in order:
                torch.save(rows_ND.bfloat16().clone(), order["file"])
        elif "rate" in order:
            best = 0.0
            for dtype in (torch.float32, torch.bfloat16):  # without bfloat16 instructions float32 is the faster one
                a, b = torch.zeros(args.rows * args.tokens, order["rate"][0], dtype=dtype), torch.zeros(*order["rate"])
                b, times = b.to(dtype), []
                for _ in range(5):
                    began = time.perf_counter()
                    torch.mm(a, b)
                    times.append(time.perf_counter() - began)
                    if a.numel() * b.shape[1] / times[-1] < best / 4:  # a minute each, on some CPUs
                        break
                best = max(best, a.numel() * b.shape[1] / min(times))
            answer = {"macs_per_second": best}
        else:
            answer = {"peak_gb": round((peak - before) / 2**20, 2)}


# -- the run ----------------------------------------------------------------------------------------------------------


class Worker:
    """An implementation in its own process."""

    def __init__(self, name: str, python: str, args: argparse.Namespace) -> None:
        self.name, self.seconds, self.bytes = name, list[float](), 0
        sizes = [f"--{key}={getattr(args, key)}" for key in ("layer", "rows", "tokens", "vocab", "threads")]
        command = [python, str(HERE / "capture.py"), "--worker", name, "--model", args.model, "--shards", args.shards]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        environment["PYTHONPATH"] = str(HERE.parent) if name.startswith("ours") else ""
        self.process = subprocess.Popen(
            [*command, *sizes], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.born = self._answer()

    def ask(self, **order: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
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


def peer_python(folder: Path) -> tuple[str, bool]:
    """The interpreter of an environment with the peers, made where there is none, and whether nnsight is in it."""
    from benchmarks.decode import peer_python as plain_python

    python = plain_python(folder)
    pins = HERE / "peers.txt"
    wanted = [line.partition(";")[0].strip() for line in pins.read_text().splitlines() if 'extra == "nnsight"' in line]
    install = [python, "-m", "pip", "install", "--quiet", "-c", str(HERE.parent / "constraints.txt"), *wanted]
    there = subprocess.run([python, "-c", "import nnsight"], capture_output=True, check=False).returncode == 0
    return python, there or subprocess.run(install, check=False).returncode == 0


def measure(args: argparse.Namespace, python: str, names: list[str], shape: dict[str, Any]) -> None:
    import torch

    workers = [Worker(name, sys.executable if name.startswith("ours") else python, args) for name in names]
    first, off = None, {}
    for worker in workers:
        file = Path(args.shards) / f"{worker.name}.pt"
        worker.ask(batches=1, file=str(file))
        rows_ND = torch.load(file, weights_only=True).float()
        first = rows_ND if first is None else first
        off[worker.name] = float((rows_ND - first).norm() / first.norm())
        worker.ask(batches=1)
    for _ in range(args.rounds):
        for worker in workers:
            answer = worker.ask(batches=args.batches)
            worker.seconds.append(answer["seconds"])
            worker.bytes = answer["bytes"]
    rate = workers[-1].ask(rate=[shape["d"], shape["f"]])["macs_per_second"]
    kv = shape["d"] // shape["heads"] * shape["kv"]
    block = 2 * shape["d"] ** 2 + 2 * shape["d"] * kv + 3 * shape["d"] * shape["f"]
    bound, tokens = rate / (args.layer * block), args.rows * args.tokens * args.batches
    lines = []
    for worker in workers:
        dtype = "float32" if worker.name.endswith("float32") else "bfloat16"
        median, best = statistics.median(worker.seconds), min(worker.seconds)
        lines.append({
            "who": worker.name, "layer": args.layer, "rows": args.rows, "tokens": args.tokens, "dtype": dtype,
            "threads": args.threads, **worker.born, "tok_s_median": round(tokens / median, 1),
            "tok_s_best": round(tokens / best, 1), "runs": args.rounds, "bytes_per_s": round(worker.bytes / median),
            "bound_tok_s": round(bound, 1), "off": off[worker.name], **worker.ask(peak=True),
        })  # fmt: skip
        worker.close()
    for line in lines:
        sys.stdout.write(json.dumps(line) + "\n")
    peers = [line["tok_s_median"] for line in lines if not line["who"].startswith("ours")]
    most = max(peers, default=float("nan"))
    sys.stdout.write(
        f"\n{'':18}{'tokens/s':>10}{'best':>9}{'x best peer':>13}{'of bound':>10}{'MB/s':>8}{'peak GB':>9}{'off':>10}\n"
    )
    for line in lines:
        rate = line["tok_s_median"]
        sys.stdout.write(f"{line['who']:18}{rate:10.1f}{line['tok_s_best']:9.1f}{rate / most:13.2f}{rate / bound:10.0%}"
                         f"{line['bytes_per_s'] / 1e6:8.1f}{line['peak_gb']:9.2f}{line['off']:10.1e}\n")  # fmt: skip
    rates = {line["who"]: line["tok_s_median"] for line in lines}
    if {"ours", "ours-disk"} <= rates.keys():
        sys.stdout.write(f"\nwriting costs {1 - rates['ours-disk'] / rates['ours']:.1%}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Captured tokens a second beside transformers and nnsight")
    parser.add_argument("--quick", action="store_true", help="a small shape and few rounds")
    for name, value in (("layer", 8), ("rows", 32), ("tokens", 128), ("batches", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", help="implementations, separated by commas")
    parser.add_argument("--folder", type=Path, help="where model and peers are made, and stay")
    parser.add_argument("--peer-python", help="interpreter with the peers, instead of making one")
    for name in ("worker", "model", "shards"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--vocab", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    from benchmarks.decode import SHAPES, make_model

    shape = SHAPES["tiny" if args.quick else "1b"]
    args.vocab = shape["vocab"]
    if args.quick:
        args.layer, args.rows, args.rounds = min(args.layer, 2), min(args.rows, 8), min(args.rounds, 2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        make_model(folder, shape)
        args.model, args.shards = str(folder / "model"), str(folder / "shards")
        names = args.only.split(",") if args.only else list(NAMES)
        python, nnsight = args.peer_python or sys.executable, True
        if not args.peer_python and any(not name.startswith("ours") for name in names):
            python, nnsight = peer_python(folder)
        measure(args, python, [name for name in names if nnsight or name != "nnsight"], shape)


if __name__ == "__main__":
    main()

"""What the processes of `decode.py` do: each holds one implementation and answers a JSON line with another.

The peer's process runs in an environment that has nothing of ours, so nothing of ours is imported before it is needed.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

BORN = time.perf_counter()
ROWS = {"prefill": 1, "b1": 1, "b8": 8}
MODES = ("plain", "watched")
EDIT = "7 +0.5"


class Memory:
    """The process's high-water mark of resident memory, from the moment it is made."""

    def __init__(self) -> None:
        self.before = self._read("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.before = 0

    def peak_gb(self) -> float:
        return round((self._read("VmHWM") - self.before) / 2**20, 3)

    @staticmethod
    def _read(key: str) -> int:
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return next((int(line.split()[1]) for line in lines if line.startswith(key)), 0)


class Ours:
    """Our model: plain through `stream_steps`, watched through `Engine.stream`."""

    def __init__(self, name: str, model: Path, sae: Path, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.memory = Memory()
        from steer.engine import Engine
        from steer.session import Sampling

        self.torch, self.greedy, variant = torch, Sampling(temperature=0.0), name.removeprefix("ours").lstrip("-")
        dtype = "float32" if variant == "float32" else "bfloat16"
        scheme = variant.removesuffix("-above") if variant.startswith("int") else None
        self.engine = Engine.load(
            model, sae, device="cpu", dtype=dtype, quantize=scheme, quantize_all=not variant.endswith("-above")
        )
        if self.engine.model.config.vocab_size < 10_000:  # a real model would end its replies; the random one cannot
            stops = sorted({*self.engine.tokenizer.stop_ids, *self.engine.model.config.stop_ids})
            self.greedy = Sampling(temperature=0.0, logit_bias=tuple((stop, float("-inf")) for stop in stops))
        self.caches: dict[int, Any] = {}
        self.asked: dict[tuple[int, int], tuple[list[str], list[list[int]]]] = {}

    def prompts(self, count: int, length: int) -> tuple[list[str], list[list[int]]]:
        """`count` texts of exactly `length` tokens each, and the tokens."""
        import bisect
        import random

        if (count, length) in self.asked:
            return self.asked[count, length]
        dice, texts, encode = random.Random(length), [], self.engine.tokenizer.encode
        while len(texts) < count:
            whole = "Once upon a time" + "".join(dice.choices([" a", "b", "c", " d", "e", " the", "g"], k=2 * length))
            near = bisect.bisect_left(range(len(whole)), length, key=lambda end: len(encode(whole[:end], bos=True)))
            if len(encode(whole[:near], bos=True)) == length:
                texts.append(whole[:near])
        tokens = [encode(text, bos=True) for text in texts]
        self.asked[count, length] = texts, tokens
        return texts, tokens

    def run(self, case: str, mode: str, length: int, new: int) -> float:
        """Seconds of a prefill, or from the first token known to the `new`th after it."""
        texts, tokens = self.prompts(ROWS[case], length)
        return (self._watched if mode == "watched" else self._plain)(case, texts, tokens, new)

    def _plain(self, case: str, texts: list[str], tokens: list[list[int]], new: int) -> float:
        from dataclasses import asdict

        from llama_3.generate import stream_steps
        from llama_3.sampling import Sampling

        rows, cache = len(tokens), None
        if case != "prefill":  # the prompt is read once, not in every round
            if rows not in self.caches:
                self.caches[rows] = self.engine.model.new_cache(rows, self.engine.model.config.max_context)
            cache = self.caches[rows]
            cache.truncate(len(tokens[0]) - 1)
        began = time.perf_counter()
        steps = stream_steps(
            self.engine.model, tokens, sampling=Sampling(**asdict(self.greedy)), seeds=[0] * rows, stop_ids=(),
            max_tokens=new + 1, cache=cache,
        )  # fmt: skip
        while not next(steps):
            pass
        known = time.perf_counter()
        if case == "prefill":
            return known - began
        for _ in range(new):
            assert len(next(steps)) == rows
        return time.perf_counter() - known

    def _watched(self, case: str, texts: list[str], tokens: list[list[int]], new: int) -> float:
        from steer.edits import Edit, SteeringSet
        from steer.events import PromptRead, TokenEvent
        from steer.session import Prompt

        rows, known = len(texts), 0.0
        began = time.perf_counter()
        events = self.engine.stream(
            [Prompt(text=text) for text in texts], [SteeringSet((Edit.parse(EDIT),))] * rows, sampling=self.greedy,
            seeds=[0] * rows, max_tokens=new + 1,
        )  # fmt: skip
        waiting = rows if case == "prefill" else rows * new
        for event in events:
            if isinstance(event, PromptRead):
                assert len(event.tokens) == len(tokens[0]) and event.tokens[-1].hits
                known = time.perf_counter()
                waiting -= case == "prefill"
            elif isinstance(event, TokenEvent):
                assert case == "prefill" or (event.hits and event.alternatives)
                waiting -= case != "prefill"
            if not waiting:
                break
        ended = time.perf_counter()
        events.close()
        assert not waiting, "the model stopped by itself"
        return ended - (began if case == "prefill" else known)

    def logits(self, length: int) -> Any:
        """The logits after a prompt."""
        with self.torch.inference_mode():
            return self.engine.model(self.torch.tensor(self.prompts(1, length)[1]), last_only=True)[0, 0].float()

    def bytes_per_token(self, mode: str) -> int:
        """Bytes of weights that one token of one row has to read."""
        model, sae = self.engine.model, self.engine.sae
        layers = [layer for block in model.blocks for layer in block.modules() if hasattr(layer, "in_features")]
        read = sum(getattr(layer, "stored_bytes", None) or layer.weight.nbytes for layer in layers)
        head = model.embedding_VD.nbytes if model.head is None else model.head.stored_bytes
        return int(read + head + (sae.W_enc_FD.nbytes if mode == "watched" else 0))

    def rates(self, length: int) -> dict[str, float]:
        """GB/s of a matrix times a vector; seconds of a prefill's multiplications at the best product's rate."""
        torch, best = self.torch, 1e9

        def seconds(work: Any) -> float:
            times = []
            for _ in range(7):
                began = time.perf_counter()
                work()
                times.append(time.perf_counter() - began)
            return min(times)

        matrix, vector = torch.zeros(32768, 2048, dtype=torch.bfloat16), torch.zeros(2048, dtype=torch.bfloat16)
        stream = matrix.nbytes / seconds(lambda: torch.mv(matrix, vector)) / 1e9
        for dtype in (torch.float32, torch.bfloat16):
            a, b = torch.zeros(512, 2048, dtype=dtype), torch.zeros(2048, 2048, dtype=dtype)
            best = min(best, seconds(lambda a=a, b=b: torch.mm(a, b)) / a.numel() / len(b))
        sizes = [m.in_features * m.out_features for block in self.engine.model.blocks for m in block.modules()
                 if hasattr(m, "in_features")]  # fmt: skip
        return {"stream_gb_s": round(stream, 2), "prefill_s": best * sum(sizes) * length}


class Transformers:
    """The peer, with its cache cropped to the prompt between rounds, so that only decoding is timed."""

    def __init__(self, name: str, model: Path, sae: Path, threads: int) -> None:
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
        import torch

        torch.set_num_threads(threads)
        self.memory = Memory()
        import transformers

        self.torch, self.transformers = torch, transformers
        dtype = torch.float32 if name.endswith("float32") else torch.bfloat16
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.caches: dict[int, Any] = {}
        self.sae, self.hooked, self.seen = sae, None, []
        self.tokens: dict[str, list[list[int]]] = {}

    def _watch(self) -> Any:
        """A hook as a user of transformers would write it."""
        from safetensors.torch import load_file

        torch, config = self.torch, json.loads((self.sae / "cfg.json").read_text())
        weights = {
            name: weight.to(self.model.dtype) for name, weight in load_file(self.sae / "sae.safetensors").items()
        }
        push = weights["W_dec"][7] * 0.5

        def hook(module: Any, args: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            pre = torch.nn.functional.linear(x - weights["b_dec"], weights["W_enc"], weights["b_enc"])
            self.seen = [part.tolist() for part in pre.relu().topk(config["k"])]
            return (x + push, *output[1:]) if isinstance(output, tuple) else x + push

        return self.model.model.layers[int(config["hook"].split(".")[1])].register_forward_hook(hook)

    def run(self, case: str, mode: str, length: int, new: int) -> float:
        torch, rows = self.torch, ROWS[case]
        handle = self._watch() if mode == "watched" else None
        tokens = torch.tensor(self.tokens[f"{rows}x{length}"])
        with torch.inference_mode():
            if case == "prefill":
                began = time.perf_counter()
                self.model(input_ids=tokens, use_cache=True, logits_to_keep=1)
                taken = time.perf_counter() - began
            else:
                taken = self._decode(tokens, rows, new)
        if handle is not None:
            handle.remove()
        return taken

    def _decode(self, tokens: Any, rows: int, new: int) -> float:
        if rows not in self.caches:
            self.caches[rows] = self.transformers.DynamicCache(config=self.model.config)
            self.model(input_ids=tokens, past_key_values=self.caches[rows], use_cache=True, logits_to_keep=1)
        self.caches[rows].crop(tokens.shape[1] - 1 - self.caches[rows].get_seq_length())
        times: list[float] = []

        def clock(ids: Any, scores: Any) -> Any:
            times.append(time.perf_counter())
            return scores

        out = self.model.generate(
            input_ids=tokens, attention_mask=self.torch.ones_like(tokens), past_key_values=self.caches[rows],
            max_new_tokens=new + 1, min_new_tokens=new + 1, do_sample=False, eos_token_id=None, pad_token_id=0,
            logits_processor=self.transformers.LogitsProcessorList([clock]),
        )  # fmt: skip
        assert out.shape[1] == tokens.shape[1] + new + 1 == tokens.shape[1] + len(times)
        return times[-1] - times[0]

    def logits(self, length: int) -> Any:
        with self.torch.inference_mode():
            tokens = self.torch.tensor(self.tokens[f"1x{length}"])
            return self.model(input_ids=tokens, logits_to_keep=1).logits[0, -1].float()


def work(name: str, model: Path, sae: Path, threads: int) -> None:
    """Answer one JSON line with another until the input ends."""
    worker: Any = (Ours if name.startswith("ours") else Transformers)(name, model, sae, threads)
    versions = {"torch": worker.torch.__version__, "python": sys.version.split()[0]}
    if isinstance(worker, Transformers):
        versions["transformers"] = worker.transformers.__version__
    answer: Any = {"ready_s": round(time.perf_counter() - BORN, 2), "versions": versions}
    while True:
        print(json.dumps(answer), flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        order = json.loads(line)
        match order.pop("do"):
            case "run":
                answer = worker.run(**order)
            case "prompts":
                answer = worker.prompts(**order)[1]
            case "tokens":
                worker.tokens[order["key"]] = order["tokens"]
                answer = None
            case "logits":
                worker.torch.save(worker.logits(order["length"]), order["file"])
                answer = None
            case "facts":
                answer = {mode: worker.bytes_per_token(mode) for mode in MODES} | worker.rates(order["length"])
            case "peak":
                answer = worker.memory.peak_gb()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One implementation of decode.py")
    parser.add_argument("name")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sae", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    work(given.name, given.model, given.sae, given.threads)

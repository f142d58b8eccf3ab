"""What loading costs: seconds and peak memory of a 1B-shaped model from every layout, each in a fresh process.

Random bf16 weights (16 layers, d_model 2048, 32 query heads on 8, vocabulary 128,256, tied: 2.47 GB) are written in one
layout at a time and loaded as bfloat16. Memory is the peak resident set above that of the process with torch imported;
files have just been written, and lie in the page cache where the machine has room. `load_seconds` ends when the loader
returns, `seconds` when every weight has then been read once: a loader may have mapped them and read none. One JSON line
per layout goes to stdout; `transformers` is its `from_pretrained` on the safetensors file.

    python -m benchmarks.load [--size tiny] [--only NAME ...]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SIZES = {
    "1b": dict(d_model=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, d_ff=8192, vocab_size=128256),
    "tiny": dict(d_model=256, n_layers=4, n_heads=8, n_kv_heads=8, head_dim=32, d_ff=768, vocab_size=4096),
}


def memory(key: str) -> int:
    """Bytes of this process by a key of /proc/self/status: VmRSS now, VmHWM at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def forget_peak() -> None:
    """Let the kernel count the peak from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def load(path: str, loader: str) -> None:
    """Load the model at `path` in this process, and print seconds and bytes."""
    forget_peak()
    before = memory("VmRSS")
    model: torch.nn.Module
    if loader == "transformers":
        from transformers import LlamaForCausalLM

        started, busy = time.perf_counter(), time.process_time()
        model = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    else:
        from llama_3.checkpoint import load_model

        started, busy = time.perf_counter(), time.process_time()
        model = load_model(path, torch.bfloat16)
    loaded = time.perf_counter() - started
    weights = {weight.data_ptr(): weight for weight in model.parameters()}
    for weight in weights.values():
        weight.view(torch.int16).amax()
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    peak, size = memory("VmHWM") - before, sum(weight.nbytes for weight in weights.values())
    found = {
        "load_seconds": round(loaded, 2),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(busy, 2),
        "peak_mb": round(peak / 1e6),
        "ratio": round(peak / size, 3),
    }
    print(json.dumps({"size_mb": round(size / 1e6), **found}))


def write(folder: Path, layout: str, size: str) -> None:
    """Write random weights of a size in one layout."""
    from llama_3.checkpoint import tensor_shapes
    from llama_3.config import RopeScaling
    from tests.llama_3 import layouts
    from tests.tiny import tiny_config

    config = tiny_config(**SIZES[size], rope_theta=5e5, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192))
    torch.manual_seed(0)
    state = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in tensor_shapes(config).items()}
    for tensor in state.values():
        tensor.normal_(std=0.02)
    kind, _, detail = layout.partition(" ")
    writers = {
        "safetensors": layouts.write_safetensors,
        "sharded": layouts.write_sharded_safetensors,
        "bin": layouts.write_bin,
        "transformers": layouts.write_safetensors,
    }
    if kind == "meta":
        layouts.meta_writer(int(detail))(folder, config, state)
    elif kind == "gguf":
        layouts.gguf_writer(detail)(folder, config, state)
    else:
        writers[kind](folder, config, state)


LAYOUTS = (
    "safetensors", "sharded", "bin", "meta 1", "meta 2", "meta 8", "gguf BF16", "gguf F16", "gguf Q8_0", "gguf Q4_0",
    "transformers",
)  # fmt: skip


def main() -> None:
    """Write, load and delete each layout in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b", help="how large a model to write")
    parser.add_argument("--only", nargs="+", choices=LAYOUTS, default=LAYOUTS, help="the layouts to try")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)  # write or load, in a process of its own
    given = parser.parse_args()
    if given.step:
        step, path, layout = given.step
        write(Path(path), layout, given.size) if step == "write" else load(path, layout)
        return
    for layout in given.only:
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "model")
            command = [sys.executable, "-m", "benchmarks.load", "--size", given.size, "--step"]
            subprocess.run([*command, "write", path, layout], check=True, stdout=subprocess.DEVNULL)
            loaded = subprocess.run([*command, "load", path, layout], check=True, stdout=subprocess.PIPE, text=True)
        print(json.dumps({"layout": layout, "dtype": "bfloat16", **json.loads(loaded.stdout)}), flush=True)


if __name__ == "__main__":
    main()

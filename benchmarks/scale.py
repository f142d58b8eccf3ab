"""One training step at 1 and 2 processes against the formulas of docs/scale.md.

    python benchmarks/scale.py                       # both kinds of sharing, the sizes below
    python benchmarks/scale.py --latents 4096 --batch 1024 --dead 0.05

Processes are joined by gloo on this machine, each with one thread. The bytes that a process sends are read from its own
TCP sockets (Linux), so that they are what went over the wire and not what a formula says. Bounds beside them: bytes by
the formulas of docs/scale.md, and the time of the encoder's product alone at the rate that the same process measures
for it. A JSON line for each set-up, then a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SETUPS = (("alone", 1), ("data", 2), ("latents", 2))
WARM, TIMED = 2, 5
TCP_BYTES_ACKED = 120
"""Where Linux's struct tcp_info holds the bytes that were sent and acknowledged."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--latents", type=int, default=24_576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024, help="tokens of one step, of all processes together")
    parser.add_argument("--dead", type=float, default=0.0, help="share of latents that are dead, for AuxK")
    parser.add_argument("--k-aux", type=int, default=256)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given)
        return
    turns: dict[str, list[dict[str, Any]]] = {}
    for _ in range(2):  # in turns, so that a busy minute of the machine does not fall on one set-up alone
        for kind, size in SETUPS:
            found = start(kind, size)
            turns.setdefault(kind, []).append(found)
            print(json.dumps(found), flush=True)
    best = [min(runs, key=lambda run: run["median_s"]) for runs in turns.values()]
    print("\n| sharing | processes | s a step | tokens/s | encoder alone, s | MB sent, measured | by formula |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for run in best:
        print(
            f"| {run['kind']} | {run['processes']} | {run['median_s']:.3f} | {given.batch / run['median_s']:,.0f} "
            f"| {run['encoder_s']:.3f} | {run['sent'] / 1e6:.2f} | {run['formula'] / 1e6:.2f} |"
        )


def start(kind: str, size: int) -> dict[str, Any]:
    """What the first of `size` processes finds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).resolve().parent.parent
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(size), "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", kind]
    running = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"a process of {kind} with {size} failed")
    found: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return found


def work(given: argparse.Namespace) -> None:
    """One process: times the steps, counts what its sockets sent, and prints it."""
    import torch

    from train.distributed import join_team
    from train.recipe import Recipe
    from train.step import SparseStep

    torch.set_num_threads(1)
    team = join_team("latents" if given.worker == "latents" else "data")
    recipe = Recipe(k=given.k, k_aux=given.k_aux, dead_after=10**9, revival="auxk" if given.dead else "none")
    batches = [torch.randn(given.batch, given.width, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    took, sent = [], []
    step = SparseStep.begin(given.latents, torch.zeros(given.width), recipe, 0, variance=given.width, team=team)
    with step:
        for number in range(WARM + TIMED):
            step.silent_F[: round(given.dead * step.d_sae)] = recipe.dead_after
            x_BD = batches[number % len(batches)][team.rows(given.batch)]
            team.wait()
            before, began = bytes_sent(), time.perf_counter()
            step.update(step.gradient(x_BD), 1e-4)
            took.append(time.perf_counter() - began)
            team.wait()
            sent.append(bytes_sent() - before)
        rows, latents = len(x_BD), step.d_sae
        dtype = torch.bfloat16 if step.encoder.screen == torch.bfloat16 else torch.float32
        rate = product_rate(rows, given.width, latents, dtype)
    report = {
        "what": "one step of a TopK SAE",
        "kind": given.worker,
        "processes": team.size,
        "width": given.width,
        "latents": given.latents,
        "k": given.k,
        "batch": given.batch,
        "dead": given.dead,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": 1,
        "median_s": statistics.median(took[WARM:]),
        "best_s": min(took[WARM:]),
        "runs": TIMED,
        "multiply_adds": multiply_adds(given, given.worker, team.size),
        "encoder_s": rows * latents * given.width / rate,
        "sent": statistics.median(sent[WARM:]),
        "formula": bytes_of_a_step(given, given.worker, team.size),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if team.rank == 0:
        print(json.dumps(report))
    team.wait()
    team.leave()


def multiply_adds(given: argparse.Namespace, kind: str, size: int) -> int:
    """Of one process: the encoder, the scores of its candidates, decode, its gradient, both weight gradients, AuxK."""
    batch, width, latents, k = given.batch, given.width, given.latents, given.k
    candidates = batch * (k + 8) * width // (1 if kind == "latents" else size)  # each slice has k candidates of its own
    aux = 5 * batch * round(given.dead * latents) * width
    return candidates + (batch * latents * width + 4 * batch * k * width + aux) // size


def bytes_of_a_step(given: argparse.Namespace, kind: str, size: int) -> float:
    """What one process sends by the formulas of docs/scale.md."""
    batch, width, latents = given.batch, given.width, given.latents
    around, onwards = 2 * (size - 1) / size, size - 1  # a summed tensor goes twice around the ring, a gathered one once
    if kind == "data":
        return around * (4 * 2 * latents * width + (4 + 8) * latents + 4 * width)
    dead = round(given.dead * latents)
    reconstructions = 2 if dead else 1
    values = batch * (given.k + (min(given.k_aux, dead // size) if dead > given.k_aux else 0))
    return around * 4 * (reconstructions * batch + 1) * width + onwards * 4 * values


def bytes_sent() -> int:
    """Bytes that all TCP sockets of this process have sent and seen acknowledged."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                if copy.type == socket.SOCK_STREAM and copy.family in (socket.AF_INET, socket.AF_INET6):
                    info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
                    total += struct.unpack_from("Q", info, TCP_BYTES_ACKED)[0]
        except OSError:
            continue  # closed meanwhile, or not connected
    return total


def product_rate(rows: int, width: int, latents: int, dtype: Any) -> float:
    """Multiply-adds a second of the encoder's product in chunks, as a step makes it."""
    import torch

    x_CD, weight_FD = torch.ones(min(256, rows), width, dtype=dtype), torch.ones(latents, width, dtype=dtype)
    out_CF = torch.empty(len(x_CD), latents, dtype=dtype)
    took = []
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(x_CD, weight_FD.t(), out=out_CF)
        took.append(time.perf_counter() - began)
    return len(x_CD) * latents * width / statistics.median(took)


if __name__ == "__main__":
    main()

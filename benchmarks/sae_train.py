"""How fast we train a TopK SAE, beside the published trainers: same start, same data, same number of steps, one run.

    python -m benchmarks.sae_train             # about 20 minutes on two cores
    python -m benchmarks.sae_train --quality   # FVU after equal steps, ours and dense float32: about 15 minutes
    python -m benchmarks.sae_train --quick     # a tiny size: does it still run?

Peers are those of peers.txt, each in an environment that this script makes under `--peers` and that stays; beside them
the same loss and optimiser by autograd through dense products, in float32 and in bfloat16 autocast. Every
implementation lives in a process of its own and they take turns, a step each, one at a time. There is not memory for
all of them at once, so they run in groups, ours in each: a ratio is always one of steps taken in turns. Then ours and
those peers that were at least half as fast as the fastest run once more with malloc told to keep its memory
(`--tuned all`: every one of them).

The clock covers a step from a batch in memory to the weights after it. Two rounds warm up, `--rounds` are timed; an
implementation that has taken `--patience` seconds, ours and sparsify excepted, stops early: after one warm-up and two
timed rounds at least, or one where a single round is longer than that. A bfloat16 one of which a single step would be
is left out, with the reason: not every CPU multiplies bfloat16 fast. FVU is that of 512 rows held out, computed in
float32 by one function for all of them. AuxK is off, or on with `--auxk` in all of them, a latent being dead after two
silent batches.

Peak memory is the process's high-water mark during the steps, above what it had with its packages imported. The bound
is the encoder's product at the best rate of this machine for it and one pass over weights and Adam's moments at its
rate of copying, both measured before and after.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SIZES = "768x24576x32x4096,768x24576x32x1024,2048x32768x64x4096,2048x32768x64x1024"
QUICK = "64x1024x8x256"
LONG = "768x24576x32x1024"
"""The size at which `--quality` takes 200 steps instead of 10."""
GROUPS = (
    ("ours", "sparsify", "dense", "dictionary-learning"),
    ("ours", "sae-lens", "sae-lens-sparse", "sae-lens-bf16", "dense-bf16"),
)
CLAIM = ("ours", "sparsify")
ENVIRONMENTS = {
    "sparsify": ("sparsify", "eai-sparsify"),
    "sae-lens": ("sae-lens", "sae-lens"),
    "sae-lens-sparse": ("sae-lens", "sae-lens"),
    "sae-lens-bf16": ("sae-lens", "sae-lens"),
    "dictionary-learning": ("dictionary-learning", "dictionary-learning"),
}
"""Peer: its environment, and the package whose version is told."""
ALONE = ("dictionary-learning",)
"""Installed without dependencies: of those its trainer needs only the ones that peers.txt names."""
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


@dataclass(frozen=True)
class Size:
    width: int
    latents: int
    k: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> "Size":
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"d {self.width:,}, n {self.latents:,}, k {self.k}, batch {self.batch:,}"

    @property
    def product(self) -> int:
        """Operations of the encoder's product on a batch."""
        return 2 * self.batch * self.width * self.latents


# -- processes --------------------------------------------------------------------------------------------------------


@dataclass
class Room:
    """Where and how the processes of one size run."""

    size: Size
    args: argparse.Namespace
    pythons: dict[str, str]
    folder: Path

    def command(self, name: str, *more: str) -> list[str]:
        setup = vars(self.size) | {"threads": self.args.threads, "auxk": self.args.auxk}
        python = self.pythons[ENVIRONMENTS[name][0]] if name in ENVIRONMENTS else sys.executable
        return [python, str(HERE / "sae_train_workers.py"), name, "--setup", json.dumps(setup), "--folder",
                str(self.folder), *more]  # fmt: skip

    def environment(self, name: str) -> dict[str, str]:
        ours = {} if name in ENVIRONMENTS else {"PYTHONPATH": str(HERE.parent)}
        quiet = {"OMP_NUM_THREADS": str(self.args.threads), "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
        return {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")} | quiet | ours

    def run(self, name: str, *more: str) -> str:
        """What a process that ends by itself prints."""
        done = subprocess.run(
            self.command(name, *more), env=self.environment(name), stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout


@dataclass
class Worker:
    """An implementation in its own process, what it did and how long that took."""

    name: str
    room: Room
    tuned: bool = False
    warm: int = 0
    seconds: list[float] = field(default_factory=list)
    """of each round, those that warm up first"""
    others: list[float] = field(default_factory=list)
    """cores that other processes had during each round"""
    fvu: dict[int, float] = field(default_factory=dict)
    """by the number of steps taken"""
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        package = ["--versions", ENVIRONMENTS[self.name][1]] if self.name in ENVIRONMENTS else []
        environment = self.room.environment(self.name) | (TUNED if self.tuned else {})
        self.process = subprocess.Popen(
            self.room.command(self.name, *package), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        self.warm = self.room.args.warm

    def ready(self) -> None:
        """Waits until it is set up."""
        self.versions = self.answer()

    @property
    def title(self) -> str:
        return f"{self.name}, tuned" if self.tuned else self.name

    @property
    def timed(self) -> list[float]:
        return self.seconds[self.warm :]

    def goes_on(self) -> bool:
        """Whether it takes part in the next round."""
        args, patience = self.room.args, self.room.args.patience
        if self.name not in CLAIM:
            if len(self.seconds) == 1 and self.seconds[0] > patience / 4 and not args.auxk:
                self.warm = min(self.warm, 1)
            enough = 2 if args.auxk or self.seconds[:1] < [patience] else 1
            if len(self.timed) >= enough and sum(self.seconds) > patience:
                return False
        return len(self.timed) < int(args.rounds)

    def turn(self, steps: int) -> None:
        """One round, and the FVU after it."""
        seconds, others = self.ask("steps", count=steps)
        self.seconds.append(seconds)
        self.others.append(others)
        self.fvu[len(self.seconds) * steps] = round(self.ask("fvu"), 5)
        print(f"  {self.title}: {self.seconds[-1]:.2f} s", file=sys.stderr, flush=True)

    def ask(self, do: str, **order: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do} | order) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.title} ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def peer_python(folder: Path, peer: str) -> str:
    """The interpreter of an environment with the peer in it, made where there is none."""
    home = folder / peer
    python, made = str(home / "bin" / "python"), home / "installed"
    if not made.exists():
        print(f"installing {peer} under {home}", file=sys.stderr)
        lines = (HERE / "peers.txt").read_text().splitlines()
        pins = [line.split(";")[0].strip() for line in lines if f'extra == "{peer}"' in line]
        install = [python, "-m", "pip", "install", "--quiet", "-c", str(HERE.parent / "constraints.txt")]
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        subprocess.run([*install, "torch", "numpy"], check=True)
        subprocess.run([*install, *(["--no-deps"] if peer in ALONE else ["torch"]), *pins], check=True)
        made.touch()
    return python


# -- the run ----------------------------------------------------------------------------------------------------------


def race(room: Room, entries: list[tuple[str, bool]], again: bool) -> list[dict[str, Any]]:
    """Lets implementations, each tuned or not, take turns; one line for each, with our speed over its own.

    `again`: ours comes first and had its rounds in an earlier race.
    """
    args, size, workers = room.args, room.size, list[Worker]()
    try:
        for name, tuned in entries:
            workers.append(Worker(name, room, tuned))
        for worker in workers:
            worker.ready()
        while going := [worker for worker in workers if worker.goes_on()]:
            # Ours was measured in full before, and is here for comparison.
            if again and going == workers[:1] and len(workers[0].timed) >= 2:
                break
            for worker in going:
                worker.turn(args.steps)
        peaks = [worker.ask("peak") for worker in workers]
    finally:
        for worker in workers:
            worker.close()
    tokens = size.batch * args.steps
    yardstick = statistics.median(workers[0].timed) if entries[0] == ("ours", False) else None
    lines = []
    for worker, peak in zip(workers, peaks, strict=True):
        median = statistics.median(worker.timed)
        lines.append({
            "what": "sae_train", "who": worker.name, "malloc": "tuned" if worker.tuned else "released", **vars(size),
            "auxk": args.auxk, "dtype": "bf16 autocast" if worker.name.endswith("bf16") else "float32",
            "threads": args.threads, "versions": worker.versions, "runs": len(worker.timed), "steps": args.steps,
            "warm": worker.warm, "tok_s_median": round(tokens / median, 1),
            "tok_s_best": round(tokens / min(worker.timed), 1), "peak_gb": peak, "fvu": worker.fvu,
            "others_cores": round(statistics.median(worker.others[worker.warm :]), 2),
            "ours_over_it": round(median / yardstick, 3) if yardstick else None,
        })  # fmt: skip
        print(json.dumps(lines[-1]), flush=True)
    return lines


def contenders(lines: list[dict[str, Any]], which: str) -> list[str]:
    """Peers to run once more with malloc tuned."""
    peers = {line["who"]: line["tok_s_median"] for line in lines if line["who"] != "ours"}
    if which == "none" or not peers:
        return []
    return [name for name, rate in peers.items() if which == "all" or name in CLAIM or rate > max(peers.values()) / 2]


def best_rates(*measured: str) -> dict[str, float]:
    each = [json.loads(text) for text in measured]
    return {key: round(max(found[key] for found in each), 1) for key in each[0]}


def run_size(room: Room) -> None:
    """Measures one size, prints a line for each implementation and then the table."""
    args, size = room.args, room.size
    room.run("prepare", "--batches", str((args.warm + args.rounds) * args.steps))
    before = room.run("rates")
    slow_bf16 = 5 * size.product / json.loads(before)["bfloat16"] / 1e9  # seconds of a dense step's five products
    chosen = args.only.split(",") if args.only else [name for group in GROUPS for name in group]
    lines, left_out = list[dict[str, Any]](), list[str]()
    for group in GROUPS:
        entries = [(name, False) for name in group if name in chosen]
        if slow_bf16 > args.patience:
            left_out += [name for name, _ in entries if name.endswith("bf16")]
            entries = [entry for entry in entries if not entry[0].endswith("bf16")]
        if [entry for entry in entries if entry != ("ours", False)]:
            lines += race(room, entries, again=bool(lines) and "ours" in chosen)
    tuned = [(name, True) for name in contenders(lines, args.tuned)]
    ours = [("ours", False)] * ("ours" in chosen)
    if ours and args.tuned != "none":
        tuned = [("ours", True), *tuned]
    while tuned:  # these keep their peak, so fewer fit
        lines += race(room, ours + tuned[:3], again=bool(ours))
        tuned = tuned[3:]
    table(size, lines, best_rates(before, room.run("rates")))
    for name in left_out:
        print(f"- {name} left out: a step's products alone would take {slow_bf16:.0f} s on this machine")
    print(flush=True)


def table(size: Size, lines: list[dict[str, Any]], rate: dict[str, float]) -> None:
    """What was measured, with ratios and the bound, as Markdown."""
    everyone = {(line["who"], line["malloc"]): line for line in reversed(lines)}
    ordered = sorted(everyone.values(), key=lambda line: (line["malloc"], -line["tok_s_median"]))
    common = str(min(max(line["fvu"]) for line in ordered))
    last = str(max(max(line["fvu"]) for line in ordered))
    base = everyone.get(("sparsify", "released"))
    print(f"\n### {size}{', AuxK' if ordered[0]['auxk'] else ''}\n")
    print(f"| implementation | malloc | tokens/s | best | rounds | peak GB | FVU, {common} steps | {last} steps "
          "| ours over it | it over sparsify |")  # fmt: skip
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for line in ordered:
        fvu = {str(steps): value for steps, value in line["fvu"].items()}
        over = line["ours_over_it"]
        # Both were timed against ours in turns; that beats a ratio of two medians from different minutes.
        beside = f"{base['ours_over_it'] / over:.2f}" if base and over else ""
        print(f"| {line['who']} | {line['malloc']} | {line['tok_s_median']:,.0f} | {line['tok_s_best']:,.0f} "
              f"| {line['runs']} | {line['peak_gb']:.2f} | {fvu[common]:.5f} | {fvu.get(last, '')} "
              f"| {f'{over:.2f}' if over else ''} | {beside} |")  # fmt: skip
    kind = max(("float32", "bfloat16"), key=lambda name: rate[name])
    product = size.product / rate[kind] / 1e9
    # Two matrices, each with two moments, four bytes a number, read and written.
    weights = 2 * 2 * 3 * 4 * size.width * size.latents / rate["copy"] / 1e9
    bound = size.batch / (product + weights)
    print(f"\n- bound {bound:,.0f} tokens/s: the encoder's product {product * 1e3:.0f} ms at {rate[kind]:,.0f} GFLOP/s "
          f"({kind}; float32 {rate['float32']:,.0f}, bfloat16 {rate['bfloat16']:,.0f}), weights and moments "
          f"{weights * 1e3:.0f} ms at {rate['copy']:.0f} GB/s of copying")  # fmt: skip
    ours = everyone.get(("ours", "released"))
    if ours:
        print(f"- ours reaches {ours['tok_s_median'] / bound:.0%} of the bound")
    if ours and base:
        print(f"- ours over sparsify as released {base['ours_over_it']:.2f}; its memory over sparsify's "
              f"{ours['peak_gb'] / base['peak_gb']:.2f}")  # fmt: skip
    print(f"- other processes had {max(line['others_cores'] for line in ordered):.1f} cores at most (median of a row)")
    rivals = [line for line in ordered if line["malloc"] == "tuned" and line["who"] != "ours" and line["ours_over_it"]]
    if rivals:
        best = min(rivals, key=lambda line: float(line["ours_over_it"]))
        print(f"- ours over the best tuned peer, {best['who']}, {best['ours_over_it']:.2f}")


def run_quality(room: Room) -> None:
    """FVU of ours and of the dense float32 reference after the same steps, each in its own time."""
    size, steps, found = room.size, room.args.steps, {}
    every = max(steps // 5, 1)
    room.run("prepare", "--batches", str(steps))
    for name in ("dense", "ours"):
        worker = Worker(name, room)
        worker.ready()
        while sum(worker.fvu) < 1 or max(worker.fvu) < steps:
            count = min(every, steps - max(worker.fvu, default=0))
            worker.seconds.append(worker.ask("steps", count=count)[0])
            worker.fvu[max(worker.fvu, default=0) + count] = worker.ask("fvu")
        worker.close()
        found[name] = worker.fvu
        print(json.dumps({"what": "sae_train quality", "who": name, **vars(size), "auxk": room.args.auxk,
                          "threads": room.args.threads, "versions": worker.versions,
                          "seconds": round(sum(worker.seconds), 1), "fvu": worker.fvu}), flush=True)  # fmt: skip
    print(f"\n### {size}: FVU after equal steps\n\n| steps | dense float32 | ours | ours over dense |")
    print("|---:|---:|---:|---:|")
    for count, dense in found["dense"].items():
        print(f"| {count} | {dense:.6f} | {found['ours'][count]:.6f} | {found['ours'][count] / dense:.5f} |")
    print(flush=True)


def main() -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "steer-benchmarks"
    parser = argparse.ArgumentParser(description="Tokens per second of training an SAE, beside the published trainers")
    parser.add_argument("--sizes", default=SIZES, help="width x latents x k x batch, several separated by commas")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--warm", type=int, default=2, help="rounds before those")
    parser.add_argument("--steps", type=int, help="steps of a round (1), or of --quality (200 at one size, else 10)")
    parser.add_argument("--only", help=f"implementations, separated by commas, of {', '.join({*sum(GROUPS, ())})}")
    parser.add_argument("--tuned", choices=("contenders", "all", "none"), default="contenders")
    parser.add_argument("--auxk", action="store_true", help="AuxK on")
    parser.add_argument("--quality", action="store_true", help="FVU after equal steps instead of speed")
    parser.add_argument("--quick", action="store_true", help=f"the size {QUICK} only")
    parser.add_argument("--patience", type=float, default=15.0, help="seconds for the slow ones at each size")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--peers", type=Path, default=cache, help="folder of the peers' environments")
    args = parser.parse_args()
    known = {name for group in GROUPS for name in group}
    if args.only and (unknown := set(args.only.split(",")) - known):
        parser.error(f"not an implementation: {', '.join(sorted(unknown))}")
    wanted = set(args.only.split(",")) if args.only else known
    needed = set() if args.quality else {ENVIRONMENTS[name][0] for name in wanted & ENVIRONMENTS.keys()}
    pythons = {peer: peer_python(args.peers.resolve(), peer) for peer in sorted(needed)}
    steps = args.steps
    for text in (QUICK if args.quick else args.sizes).split(","):
        args.steps = steps or ((200 if text in (LONG, QUICK) else 10) if args.quality else 1)
        with tempfile.TemporaryDirectory() as folder:
            room = Room(Size.parse(text), args, pythons, Path(folder))
            print(f"{room.size}", file=sys.stderr)
            (run_quality if args.quality else run_size)(room)


if __name__ == "__main__":
    main()

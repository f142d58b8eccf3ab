"""What the kinds of SAE, the places to read and the switches of the recipe do to an SAE: three tables from short runs.

    steer capture TEXT... --hook blocks.3.hook_resid_post --max-tokens 2600000 --dtype float32 --out acts
    python -m benchmarks.recipes architectures acts --out runs --text HELD_OUT...
    python -m benchmarks.recipes switches acts --out runs --text HELD_OUT...
    python -m benchmarks.recipes places places --out runs --text HELD_OUT...

Each run is a folder of `steer train` under `--out` and goes on where it was stopped; a finished one is only read. Every
SAE is then measured by `train.evaluate` on text that nothing was trained on. `places` takes a folder of several hooks.
The demo model's tables are in docs/recipes.md.

Under the table of architectures stands a second one, of each row against TopK at the same L0: TopK's own figure there
lies on a straight line in the logarithms between its rows (or beyond the last one, where a row's L0 is a little outside
of them). `--picture FILE.png` draws both figures against L0.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from llama_3.checkpoint import load_model
from llama_3.tokenizer import load_tokenizer
from sae.checkpoint import load_sae
from steer.config import DEMO_MODEL
from train.config import TrainConfig
from train.evaluate import evaluate
from train.metrics import read_metrics
from train.trainer import train

LATENTS = 4096
L0S = (16, 32, 64)
KINDS: dict[str, dict[str, Any]] = {
    "TopK": {"arch": "topk"},
    "BatchTopK": {"arch": "batchtopk"},
    "ReLU with L1": {"arch": "relu"},
    "JumpReLU": {"arch": "jumprelu", "sparsity": 0.002},
    "Gated": {"arch": "gated"},
    "ProLU": {"arch": "prolu"},
    "ProLU, straight-through": {"arch": "prolu", "prolu_gradient": "ste"},
    "TopK, Matryoshka": {"arch": "topk", "prefixes": (256, 1024, LATENTS)},
}
"""The kinds without k are steered to their L0 while they train."""
SWITCHES: dict[str, dict[str, Any]] = {
    "default": {},
    "tied start off": {"tied_start": False},
    "scaled start off": {"scaled_start": False},
    "orthogonal directions": {"directions": "orthogonal"},
    "b_enc off": {"learn_b_enc": False},
    "b_dec off (stays at 0)": {"learn_b_dec": False, "center": "none"},
    "b_dec stays at the mean": {"learn_b_dec": False},
    "unit norm and projection off": {"unit_norm": False, "project": False},
    "projection off": {"project": False},
    "revival off": {"revival": "none"},
    "ghost gradients": {"revival": "ghost"},
    "resampling": {"revival": "resample"},
    "AuxK from k_aux dead on": {"aux_min_dead": 192},
    "k annealed from 128": {"k_anneal": 128},
    "EMA 0.999": {"ema": 0.999},
    "warm-up off": {"warmup": 0.0},
    "decay off": {"decay_share": 0.0},
    "cosine to the end": {"decay": "cosine", "decay_share": 0.98},
    "clipping at 1": {"clip": 1.0},
    "published rate (no boost)": {"lr_boost": 1.0},
    "Adam eps 1e-8": {"eps": 1e-8},
    "inputs as they are": {"scale": "none"},
    "inputs of mean norm sqrt(d)": {"scale": "norm"},
    "inputs layer-normed": {"scale": "layer_norm"},
    "inputs of unit norm": {"scale": "unit_norm"},
    "geometric median": {"center": "median"},
    "batch 4,096": {"batch": 4096},
}


def settings(table: str, tokens: int) -> dict[str, dict[str, Any]]:
    """The runs of a table by name: what differs from the default recipe."""
    shared = {"latents": LATENTS, "tokens": tokens, "stats_rows": 200_000, "checkpoint_every": 1000}
    if table == "architectures":
        runs = {
            f"{kind} {l0}": shared | change | ({"k": l0} if "topk" in change["arch"] else {"l0_target": float(l0)})
            for l0 in L0S
            for kind, change in KINDS.items()
        }
        return {"TopK 8": shared | KINDS["TopK"] | {"k": 8}} | runs  # ProLU ends below its targets: the curve to there
    return {name: shared | change for name, change in SWITCHES.items()}


def figures_of(run: Path, config: TrainConfig, activations: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run, trained first where it is not finished."""
    file = run / "figures.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    summary = train(activations, run, config, resume=True, threads=args.threads)
    rates = [entry["tokens_per_second"] for entry in read_metrics(run / "metrics.jsonl")]
    torch.set_num_threads(args.threads)
    model, sae = load_model(args.model, dtype=torch.float32), load_sae(run / "sae")
    tokenizer = load_tokenizer(args.model)
    found = evaluate(model, sae, tokenizer, args.text, args.text_tokens)
    figures = {
        "train_fvu": summary.fvu,
        "train_l0": summary.l0,
        "train_dead": summary.dead,
        "rate": statistics.median(rates),
    }
    figures |= {name: found[name] for name in ("fvu", "l0", "dead", "delta_ce", "ce_clean", "loss_recovered_zero")}
    file.write_text(json.dumps(figures))
    return figures


Rows = dict[str, dict[str, Any]]


def at_l0(curve: list[tuple[float, float]], l0: float) -> float:
    """What a curve of (L0, figure) has at an L0: straight lines in the logarithms of both, also beyond its ends."""
    (x0, y0), (x1, y1) = next((pair for pair in pairwise(curve) if l0 <= pair[1][0]), (curve[-2], curve[-1]))
    share = math.log(l0 / x0) / math.log(x1 / x0)
    return math.exp(math.log(y0) + share * math.log(y1 / y0))


def curves(rows: Rows, figure: str) -> dict[str, list[tuple[float, float]]]:
    """(L0, figure) of each kind, by rising L0."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, row in rows.items():
        found.setdefault(name.rpartition(" ")[0], []).append((row["l0"], row[figure]))
    return {kind: sorted(points) for kind, points in found.items()}


def show_matched(rows: Rows) -> None:
    """Each row over TopK at the same L0."""
    fvu, rise = (curves(rows, figure)["TopK"] for figure in ("fvu", "delta_ce"))
    print("\n| run | L0 | FVU over TopK's at this L0 | rise over TopK's at this L0 |\n|---|---:|---:|---:|")
    for name, row in rows.items():
        if not name.startswith("TopK ") and row["l0"] > 0:
            ratios = row["fvu"] / at_l0(fvu, row["l0"]), row["delta_ce"] / at_l0(rise, row["l0"])
            print(f"| {name} | {row['l0']:.2f} | {ratios[0]:.3f} | {ratios[1]:.3f} |")


def draw(rows: Rows, file: Path) -> None:
    """FVU and rise in cross-entropy against L0, a line for each kind."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name, title in zip(axes, ("fvu", "delta_ce"), ("FVU", "rise in cross-entropy, nats"), strict=True):
        for kind, points in curves(rows, name).items():
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=kind)
        axis.set(xscale="log", yscale="log", xlabel="L0", title=title)
        axis.set_xticks(L0S, [str(l0) for l0 in L0S])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter("{x:g}")
    axes[0].legend(fontsize=7)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("architectures", "switches", "places"))
    parser.add_argument("activations", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="held-out text")
    parser.add_argument("--text-tokens", type=int, default=100_000)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--tokens", type=int, help="of each run; default 5 M, for switches and places 1 M")
    parser.add_argument("--only", nargs="*", help="runs whose name begins so")
    parser.add_argument("--picture", type=Path, help="architectures: draw FVU and rise against L0")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.picture and args.table != "architectures":
        parser.error("--picture draws the architectures")
    tokens = args.tokens or (5_000_000 if args.table == "architectures" else 1_000_000)
    if args.table == "places":
        hooks = sorted(folder for folder in args.activations.iterdir() if (folder / "manifest.json").exists())
        base = {"latents": LATENTS, "tokens": tokens, "stats_rows": 200_000}
        runs = {folder.name: (folder, base) for folder in hooks}
    else:
        runs = {name: (args.activations, change) for name, change in settings(args.table, tokens).items()}
    print("| run | FVU | L0 | dead | rise in cross-entropy | FVU, training rows | dead in training | tokens/s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    rows: Rows = {}
    for name, (activations, change) in runs.items():
        if args.only and not any(name.startswith(start) for start in args.only):
            continue
        folder = args.out / args.table / name.replace(" ", "-").replace(",", "").replace("(", "").replace(")", "")
        try:
            row = figures_of(folder, TrainConfig(**change), activations, args)
        except ValueError as error:
            print(f"| {name} | {error} |", flush=True)
            print(f"{name}: {error}", file=sys.stderr)
            continue
        rows[name] = row
        print(
            f"| {name} | {row['fvu']:.4f} | {row['l0']:.2f} | {row['dead']:.2%} | {row['delta_ce']:.4f} | "
            f"{row['train_fvu']:.4f} | {row['train_dead']:.2%} | {row['rate']:,.0f} |",
            flush=True,
        )
    if args.table == "architectures" and sum(name.startswith("TopK ") for name in rows) > 1:
        show_matched(rows)
        if args.picture:
            draw(rows, args.picture)


if __name__ == "__main__":
    main()

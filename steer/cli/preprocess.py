"""`steer preprocess`: activations in, the plan by which they are read for training out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from steer.cli.options import Json, command, narrate, put
from steer.config import Settings
from steer.errors import SteerError


@command()
def preprocess(
    settings: Settings,
    activations: Annotated[
        Path,
        typer.Argument(help="A folder of `steer capture`, or of [rows, width] .safetensors or .npy.", metavar="DIR"),
    ],
    held_out: Annotated[float, typer.Option(help="Share of the documents never trained on.", metavar="SHARE")] = 0.05,
    seed: Annotated[int, typer.Option(help="Which documents these are.", metavar="N")] = 0,
    scale: Annotated[
        Literal["none", "variance", "norm", "layer_norm", "unit_norm"],
        typer.Option(
            help="Inputs as they are; as a whole to total variance D, or mean norm sqrt(D); or each token by itself."
        ),
    ] = "variance",
    center: Annotated[
        Literal["mean", "median"], typer.Option(help="Where an SAE's b_dec starts: mean or geometric median.")
    ] = "mean",
    json: Json = False,
) -> None:
    """Measure activations, hold some out, and write DIR/plan.json, by which `steer train DIR` then reads them."""
    import os

    from train.preprocess import make_plan, write_plan
    from train.reader import ShardReader

    if not activations.is_dir():
        raise SteerError(f"there is no folder `{activations}`", "make one with `steer capture`")
    reader = ShardReader(activations, seed, held_out=held_out, split_seed=seed, use_plan=False)
    if reader.notice:
        narrate(reader.notice)
    told = 0

    def tell(done: int, of: int) -> None:
        nonlocal told
        if done == of or done >= told + of / 10:
            told = done
            narrate(f"measured {done:,} of {of:,} rows")

    threads = settings.threads or os.cpu_count() or 1
    plan = make_plan(reader, scale=scale, center=center, threads=threads, on_progress=tell)
    write_plan(activations, plan)
    if held_out and not plan.held_out_rows:
        narrate("no row is held out: the documents that this split holds out are not in these activations")
    names = ("rows", "held_out_rows", "center", "variance", "norm")
    summary = {name: getattr(plan, name) for name in names} | {"scale": scale, "factor": plan.scale.factor}
    if json:
        put(summary)
    else:
        print(
            f"{plan.rows:,} rows to train on and {plan.held_out_rows:,} held out; mean norm {plan.norm:.4g}, "
            f"variance {plan.variance:.4g}, factor {plan.scale.factor:.4g}; the plan is {activations / 'plan.json'}"
        )

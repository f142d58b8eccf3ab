"""`steer train`: activations in, an SAE out."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from steer.cli import engines
from steer.cli.capture import capture_files, check_files
from steer.cli.options import Json, command, narrate, put
from steer.config import Settings

if TYPE_CHECKING:
    from train.trainer import TrainConfig

MOST_ROWS = 1_000_000
"""Rows that are captured from a text; a longer run reads them again, reshuffled."""


@command()
def train(
    settings: Settings,
    source: Annotated[
        Path, typer.Argument(help="A folder of `steer capture`, or a text.", metavar="ACTIVATIONS_OR_FILE")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; the SAE will lie in RUN/sae.", metavar="RUN")],
    arch: Annotated[Literal["topk"], typer.Option(help="Kind of SAE.")] = "topk",
    latents: Annotated[int | None, typer.Option(help="Width (default 16 times the model's).", metavar="N")] = None,
    k: Annotated[int | None, typer.Option("--k", help="Active latents per token (default 32).", metavar="N")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens (default 4,000,000).", metavar="N")] = None,
    batch: Annotated[int | None, typer.Option(help="Tokens in a step.", metavar="N")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate (default: from the width).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of first weights and row order.", metavar="N")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.", metavar="N")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small SAE in minutes.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in RUN, or start it.")] = False,
    json: Json = False,
) -> None:
    """Train an SAE."""
    from train.trainer import check_folder, read_run
    from train.trainer import train as run

    given = {"latents": latents, "k": k, "tokens": tokens, "batch": batch, "lr": lr, "seed": seed}
    given |= {"checkpoint_every": checkpoint_every}
    typed = {name: value for name, value in given.items() if value is not None}
    check_folder(out, resume)
    stored = read_run(out)[0] if (out / "config.toml").exists() else None
    config = _config(stored, typed, quick)
    if not source.is_dir():
        check_files([source])
        asked = config or stored  # a run that goes on asks for the rows it began with
        rows = min(MOST_ROWS, asked.tokens or MOST_ROWS) if asked else MOST_ROWS
        capture_files(engines.load_engine(settings), settings, [source], out / "activations", None, rows)
        source = out / "activations"
    summary = asdict(run(source, out, config, _tell, resume=resume, quick=quick, threads=settings.threads))
    if json:
        put(summary)
    else:
        told = ", ".join(f"{name} {value:g}" for name, value in summary.items() if name not in ("steps", "tokens"))
        print(f"{summary['steps']:,} steps, {summary['tokens']:,} tokens: {told}; the SAE is in {out / 'sae'}")


def _config(stored: TrainConfig | None, typed: dict[str, Any], quick: bool) -> TrainConfig | None:
    """The config to ask for: the stored or the default one with what was typed; None leaves all to the run."""
    from train.trainer import TrainConfig

    if not typed and (stored or not quick):
        return None
    return replace(stored or (TrainConfig.quick() if quick else TrainConfig()), **typed)


def _tell(entry: dict[str, Any]) -> None:
    if entry["step"] % 100 == 0 or entry["step"] == entry["steps"]:
        narrate(
            f"step {entry['step']:,} of {entry['steps']:,}: fvu {entry['fvu']:.4f}, l0 {entry['l0']:.1f}, "
            f"dead {entry['dead']:.1%}, {entry['tokens_per_second']:,.0f} tokens/s"
        )

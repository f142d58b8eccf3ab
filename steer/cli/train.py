"""`steer train`: activations (or a text) in, an SAE out; `steer train report`, `stop` and `checkpoint` for its runs.

`train` is a group of commands whose default is training itself: what is no name of a command in it is a source.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from llama_3.ranks import world
from steer.cli.capture import (
    DryRun,
    Price,
    capture_files,
    check_files,
    check_price,
    hashes,
    hooks_of,
    load_whole,
    sources,
)
from steer.cli.options import Json, app, command, narrate, put
from steer.cli.train_progress import Bars
from steer.config import DEMO_MODEL, Settings
from steer.errors import ExitCode, SteerError
from train.presets import DESCRIPTIONS

if TYPE_CHECKING:
    from train.config import TrainConfig
    from train.reader import ShardReader, Source

MOST_ROWS = 1_000_000
"""Rows that are captured from a text; a longer run reads them again, reshuffled."""
MIXED_STEPS, LEAST_MIXED, MOST_MEMORY = 64, 1 << 16, 1 << 30
"""A stream is shuffled within blocks: the steps one lasts, its rows at least, the bytes of two at most."""
MISSED = 0.05
"""Share by which an L0 may miss its target before that is said."""
TOLD = "; ".join(f"{name}: {what}" for name, what in DESCRIPTIONS.items())


class _OrTrain(TyperGroup):
    """A group in which everything that is not one of its commands goes to `run`, under the group's own name."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if args and args[0] in self.commands and args[0] != "run":
            return super().make_context(info_name, args, parent, **extra)
        return self.commands["run"].make_context(info_name, args, parent, **extra)


group = typer.Typer(cls=_OrTrain, help="Train an SAE.", rich_markup_mode=None)
app.add_typer(group, name="train")
Run = Annotated[Path, typer.Argument(help="Folder of the run.", metavar="RUN")]


@command(group)
def run(
    settings: Settings,
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder of `steer capture` or of [rows, width] .safetensors or .npy; or a text.",
            metavar="ACTIVATIONS_OR_FILE",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; the SAE will lie in RUN/sae.", metavar="RUN")],
    arch: Annotated[
        Literal["topk", "batchtopk", "relu", "jumprelu", "gated", "prolu"] | None,
        typer.Option(help="Kind of SAE (default topk)."),
    ] = None,
    latents: Annotated[int | None, typer.Option(help="Width (default 16 times the model's).", metavar="N")] = None,
    k: Annotated[int | None, typer.Option("--k", help="Active latents per token (default 32).", metavar="N")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens (default 4,000,000).", metavar="N")] = None,
    batch: Annotated[int | None, typer.Option(help="Tokens in a step.", metavar="N")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate (default: from the width).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of first weights and row order.", metavar="N")] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints at most.", metavar="N")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small SAE in minutes.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in RUN, or start it.")] = False,
    preset: Annotated[str | None, typer.Option(help=f"Where defaults come from. {TOLD}.", metavar="NAME")] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML with any setting; a run's config.toml is one.", metavar="FILE")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting, as k_aux=512; repeatable.", metavar="KEY=VALUE")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="One SAE for each value, from the same rows; repeatable.", metavar="KEY=V1,V2"),
    ] = None,
    lr_sweep: Annotated[
        str | None, typer.Option(help="Rates to try in short runs first, or auto.", metavar="V1,V2|auto")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="From a text with no activations on disk.")] = False,
    shard: Annotated[
        Literal["data", "latents"], typer.Option(help="Under torchrun: what the processes share out.")
    ] = "data",
    dry_run: DryRun = False,
    price_per_hour: Price = None,
    wandb: Annotated[str | None, typer.Option(help="Also log to Weights & Biases.", metavar="PROJECT")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log to RUN/tensorboard.")] = False,
    json: Json = False,
) -> None:
    """Train an SAE. On a run: `steer train report RUN`, `steer train stop RUN`, `steer train checkpoint RUN`."""
    from train.alarm import explained
    from train.config import check_effect, parse_settings, read_run, read_settings, typed
    from train.distributed import ALONE, join_team
    from train.signals import StoppedError
    from train.sweep import FACTORS, parse_sweep, read_sweep, write_sweep
    from train.sweep import sweep as run_sweep
    from train.trainer import check_folder, train

    check_price(price_per_hour, dry_run)
    given = {"arch": arch, "latents": latents, "k": k, "tokens": tokens, "batch": batch, "lr": lr, "seed": seed}
    given |= {"checkpoint_every": checkpoint_every}
    said = parse_settings(set_ or []) | {name: typed(name, value) for name, value in given.items() if value is not None}
    values: dict[str, Any] = (read_settings(config) if config else {}) | said
    named = preset or ("quick" if quick else values.pop("preset", None))
    values.pop("preset", None)
    if resume and not sweep and not (out / "config.toml").exists() and (kept := read_sweep(out)):
        sweep, named, values = kept[0], named or kept[1], kept[2] | values
    members = parse_sweep(sweep or [])
    rates = _rates(lr_sweep)
    if preset and quick and preset != "quick":
        raise SteerError(f"--quick is the preset quick, and --preset is {preset}", "give one of the two")
    if sweep and rates is not None:
        raise SteerError("--sweep and --lr-sweep are two things", "sweep the rate itself with --sweep lr=1e-4,2e-4")
    check_folder(out, resume or dry_run)
    stored = read_run(out)[0] if (out / "config.toml").exists() else None
    if not stored and not members and any(out.glob("*/config.toml")):
        raise SteerError(f"{out} holds a sweep", "go on with it with --resume, or choose another folder")
    chosen = _config(stored, named, values)
    check_effect([replace(chosen, **member) for member in members or [{}]], [*said, *(members[0] if members else ())])
    if stored and rates is not None:
        chosen = replace(chosen, lr=stored.lr)  # it was found when the run began
    device = _device(settings)
    if dry_run:
        tried = 0 if rates is None or stored else len(rates) or len(FACTORS)
        _show_cost(source, stream, chosen, members, tried, settings, device, price_per_hour, json)
        return
    rows = _rows(source, out, chosen, settings, stream)
    team = ALONE
    try:
        with explained():
            team = join_team(shard, device=device)
            options: dict[str, Any] = {"threads": _threads(settings), "team": team, "device": device}
            with Bars(out, wandb=wandb, tensorboard=tensorboard, shown=team.rank == 0) as bars:
                if rates is not None and not stored:
                    chosen = replace(chosen, lr=_searched(rows, out, chosen, rates, bars, options))
                if members:
                    keep = partial(write_sweep, out, sweep or [], named, values)
                    found = run_sweep(rows, out, chosen, members, bars.of, begun=keep, resume=resume, **options)
                else:
                    summary = asdict(train(rows, out, chosen, bars.of(""), resume=resume, **options))
        if members:
            _show_sweep(found, json)
        elif json:
            put(summary)
        else:
            measured = f"fvu {summary['fvu']:.4f} and l0 {summary['l0']:.2f} on {summary['measured_on']}"
            measured += f", dead {summary['dead']:.2%} in training"
            print(f"{summary['steps']:,} steps, {summary['tokens']:,} tokens: {measured}; the SAE is in {out / 'sae'}")
            _compare(summary["l0"], chosen)
    except StoppedError as stop:
        narrate(f"{stop}; the same command with --resume goes on")
        raise typer.Exit(ExitCode.INTERRUPTED) from stop
    finally:
        team.leave()


@command(group)
def report(
    settings: Settings,
    of: Run,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the pictures (default RUN/report).", metavar="DIR")
    ] = None,
    json: Json = False,
) -> None:
    """Draw a run: losses, dead latents, activity, density, as PNG files and one HTML page."""
    from train.report import report as draw

    page = draw(of, out or of / "report")
    put({"page": str(page)}) if json else print(page)


@command(group)
def stop(settings: Settings, of: Run) -> None:
    """Ask a run to save itself and end after its present step."""
    _tell(of, "stop")


@command(group)
def checkpoint(settings: Settings, of: Run) -> None:
    """Ask a run to save itself after its present step and go on."""
    _tell(of, "checkpoint")


def _tell(of: Path, word: str) -> None:
    from train.lock import is_taken
    from train.metrics import tell

    members = sorted(file.parent for file in of.glob("*/config.toml"))
    for member in [member for member in members if is_taken(member)] or members[:1] or [of]:
        tell(member, word)
    narrate(f"{of} was told: {word}; it obeys between two steps")


def _config(stored: TrainConfig | None, preset: str | None, values: dict[str, Any]) -> TrainConfig:
    """The config to ask for: that of the run that is there, unless a preset was named, with what was given."""
    from train.config import TrainConfig

    if stored and preset is None:
        other = values.get("tokens") not in (None, 0, stored.tokens) and "epochs" not in values
        length = {"epochs": 0} if other else {}  # or epochs would decide, and nobody would hear of it
        return replace(stored, **(length | values))
    return TrainConfig.of(preset or "default", **values)


def _rates(text: str | None) -> list[float] | None:
    """The learning rates to try: none for `auto`, None for no search."""
    from train.config import typed

    if text is None:
        return None
    return [] if text == "auto" else [float(typed("lr", part)) for part in text.split(",")]


def _device(settings: Settings) -> str:
    """Where to train: a CUDA card where there is one and nothing else was asked for, else the CPU."""
    import torch

    from llama_3.parallel import own_device

    wanted = settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if not wanted.startswith(("cpu", "cuda")):
        raise SteerError(f"training runs on cpu or cuda, not on {wanted}", "leave --device out")
    return str(own_device(wanted)) if world() > 1 else wanted


def _threads(settings: Settings) -> int:
    import torch

    return settings.threads or torch.get_num_threads()


def _rows(source: Path, out: Path, config: TrainConfig, settings: Settings, stream: bool) -> Source:
    """The rows to train on; those of a text are captured first, or as they are needed."""
    from train.inputs import open_rows

    if source.is_dir() and not stream:
        return _opened(source, config)
    check_files([source])
    if stream:
        return _streamed(source, config, settings)
    capture_files(load_whole(settings), settings, [source], out / "activations", None, _asked(config))
    return open_rows(out / "activations", config)


def _opened(folder: Path, config: TrainConfig) -> ShardReader:
    """The rows of a folder; says what a person should know of them."""
    from train.inputs import open_rows

    rows = open_rows(folder, config)
    if rows.notice:
        narrate(rows.notice)
    return rows


def _searched(
    rows: Source, out: Path, config: TrainConfig, rates: list[float], bars: Bars, options: dict[str, Any]
) -> float:
    """The learning rate that the short runs found best; their table goes to stderr."""
    from train.sweep import search_rate
    from train.trainer import TrainSummary

    best, table = search_rate(rows, out / "lr-sweep", config, rates, bars.of, **options)
    narrate("learning rate        FVU")
    for rate, found in table.items():
        told = f"{found.fvu:10.4f}" if isinstance(found, TrainSummary) else f"  {found}"
        narrate(f"{rate:13.3g} {told}")
    narrate(f"training with {best:.3g}")
    return best


def _compare(l0: float, config: TrainConfig) -> None:
    """Says where a run did not come to the L0 that it was steered to."""
    target = config.l0_target if config.effective("l0_target") else 0.0
    if target and abs(l0 / target - 1) > MISSED:
        narrate(f"l0 was to become {target:g}: a longer run comes nearer, or one that begins with another sparsity")


def _show_sweep(found: dict[str, Any], json: bool) -> None:
    """One line (object) a member."""
    from train.trainer import TrainSummary

    width = max(len(name) for name in found)
    if not json:
        print(f"{'':{width}}      FVU       L0     dead")
    for name, summary in found.items():
        good = isinstance(summary, TrainSummary)
        if json:
            put({"run": name} | (asdict(summary) if good else {"error": str(summary)}))
        elif good:
            print(f"{name:{width}} {summary.fvu:8.4f} {summary.l0:8.1f} {summary.dead:8.2%}")
        else:
            print(f"{name:{width}}  {summary}")


def _asked(config: TrainConfig) -> int:
    """Rows of a text that are captured; a run that goes on asks for those it began with."""
    return min(MOST_ROWS, MOST_ROWS if config.epochs else config.tokens or MOST_ROWS)


def _show_cost(
    source: Path,
    stream: bool,
    config: TrainConfig,
    members: list[dict[str, Any]],
    tried: int,
    settings: Settings,
    device: str,
    price: float | None,
    json: bool,
) -> None:
    """What it would cost, the capture of a text included, from some steps that leave nothing behind."""
    if world() > 1:
        raise SteerError("a trial is for one process", "run it without torchrun, on one of the machines")
    from train.capture import Job
    from train.cost import added
    from train.text import TextPlan
    from train.trial import runs_cost, text_cost

    options: dict[str, Any] = {"threads": _threads(settings), "device": device, "price_per_hour": price}
    parts, reads = {}, ""
    if source.is_dir() and not stream:
        rows = _opened(source, config)
        cost = runs_cost(rows, config, members, tried, **options)
        reads = f"rows    {rows.rows:,}, each read {cost.tokens / rows.rows:.1f} times"
    elif stream:
        check_files([source])
        cost = runs_cost(_streamed(source, config, settings), config, members, tried, **options)
    else:
        check_files([source])
        engine = load_whole(settings)
        job = Job(engine.model, engine.tokenizer, sources([source]), TextPlan(), engine.chat_format)
        both = text_cost(job, hooks_of(engine, None)[0], _asked(config), config, members, tried, **options)
        parts, cost = dict(zip(("capture", "train"), both, strict=True)), added(both, both[1].tokens)
    if json:
        put(asdict(cost) | {name: asdict(part) for name, part in parts.items()})
        return
    for name, part in parts.items():
        print("\n".join([f"{name}:", *(f"  {line}" for line in part.lines())]))
    print("\n".join(["both:", *(f"  {line}" for line in cost.lines())] if parts else cost.lines()))
    if reads:
        print(reads)


def _streamed(source: Path, config: TrainConfig, settings: Settings) -> Source:
    """Rows that the model makes as they are needed; of the documents, the share `held_out` is kept apart."""
    from llama_3.hub import resolve_model
    from train.capture import Job
    from train.stream import StreamSource
    from train.text import TextPlan

    if config.epochs:
        raise SteerError("nobody knows how long an epoch of a stream is", "give --tokens instead of epochs")
    engine = load_whole(settings)
    hook, width = hooks_of(engine, None)[0], engine.model.config.d_model
    job = Job(engine.model, engine.tokenizer, sources([source]), TextPlan(held_out=config.held_out), engine.chat_format)
    block = max(MIXED_STEPS * config.batch, LEAST_MIXED)
    made_by = hashes(resolve_model(settings.model) if settings.model else DEMO_MODEL)
    memory = min(MOST_MEMORY, 4 * block * width)  # two blocks in bfloat16
    return StreamSource(job, hook, config.seed, mix_bytes=memory, provenance=made_by)

"""`steer capture`: text in, activations out. Under torchrun each process runs a whole model on its own documents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llama_3.ranks import world
from steer.cli import engines
from steer.cli.options import Json, command, narrate, put
from steer.config import DEMO_MODEL, DEMO_SAE, Settings
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.engine import Engine
    from train.text import TextPlan

Files = Annotated[
    list[Path],
    typer.Argument(
        help="Text: .txt, .jsonl, .parquet, also .gz and .xz; a folder of these; hf:NAME[:CONFIG][:SPLIT].",
        metavar="FILE...",
    ),
]
Hooks = Annotated[
    list[str] | None,
    typer.Option(
        "--hook", help="As blocks.4.hook_resid_post; repeatable. Default: the SAE's, else at 60% depth.", metavar="HOOK"
    ),
]
Unit = Annotated[
    Literal["context", "packed", "sentence"],
    typer.Option(help="A row: part of one document; documents packed, always full; one sentence."),
]
Context = Annotated[int, typer.Option(help="Tokens of a row at most (default 512, of a sentence 192).", metavar="N")]
NoBos = Annotated[bool, typer.Option("--no-bos", help="Rows begin without BOS.")]
Long = Annotated[Literal["cut", "drop"], typer.Option(help="What becomes of a sentence that is longer.")]
Shuffle = Annotated[int | None, typer.Option(help="Seed of another order of documents.", metavar="SEED")]
Dedupe = Annotated[bool, typer.Option("--dedupe", help="Leave out copies of a document.")]
HeldOut = Annotated[float, typer.Option(help="Share of documents that is the held-out part.", metavar="SHARE")]
Part = Annotated[
    Literal["train", "held-out", "all"] | None,
    typer.Option(help="Which documents to read (default: all that are not held out)."),
]
SplitSeed = Annotated[int, typer.Option(help="Which documents are held out.", metavar="SEED")]
Language = Annotated[str, typer.Option(help="Whose rules end a sentence, as en or pt.", metavar="CODE")]
KeepSpecial = Annotated[
    bool, typer.Option("--keep-special", help="Capture special tokens and the first of a row as well.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what it would cost, from a short trial.")]
Price = Annotated[float | None, typer.Option("--price-per-hour", help="Of the machine, for --dry-run.", metavar="X")]
MOST_TOKENS = 4_000_000


@command()
def capture(
    settings: Settings,
    files: Files,
    out: Annotated[Path, typer.Option(help="Folder for the activations.", metavar="DIR")],
    hook: Hooks = None,
    max_tokens: Annotated[int, typer.Option(help="Rows to capture at most.", metavar="N")] = MOST_TOKENS,
    unit: Unit = "context",
    context: Context = 0,
    no_bos: NoBos = False,
    long: Long = "cut",
    shuffle: Shuffle = None,
    dedupe: Dedupe = False,
    held_out: HeldOut = 0.0,
    part: Part = None,
    split_seed: SplitSeed = 0,
    language: Language = "en",
    keep_special: KeepSpecial = False,
    shard_mb: Annotated[int, typer.Option(help="Size of a shard.", metavar="MB")] = 32,
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens the model reads at once; 2048 suit a CPU.", metavar="N")
    ] = 8192,
    dry_run: DryRun = False,
    price_per_hour: Price = None,
    json: Json = False,
) -> None:
    """Run the model over text and write its activations to shards; run again, it goes on."""
    from train.text import TextPlan

    plan = TextPlan(
        unit=unit, context=context, bos=not no_bos, long=long, shuffle=shuffle, dedupe=dedupe, held_out=held_out,
        part=part or ("train" if held_out else "all"), split_seed=split_seed, language=language,
    )  # fmt: skip
    for name, number in {"shard-mb": shard_mb, "batch-tokens": batch_tokens, "max-tokens": max_tokens}.items():
        if number < 1:
            raise SteerError(f"--{name} is {number}", "give at least 1")
    check_price(price_per_hour, dry_run)
    check_files(files)
    engine = load_whole(settings)
    if dry_run:
        from train.capture import Job, capture_cost

        job = Job(engine.model, engine.tokenizer, sources(files), plan, engine.chat_format, batch_tokens, keep_special)
        cost = capture_cost(job, hooks_of(engine, hook), max_tokens, processes=world(), price_per_hour=price_per_hour)
        if json:
            put(asdict(cost))
        else:
            print("\n".join(cost.lines()))
        return
    summary = capture_files(
        engine, settings, files, out, hook, max_tokens, plan=plan, keep_special=keep_special,
        shard_bytes=shard_mb << 20, batch_tokens=batch_tokens,
    )  # fmt: skip
    if json:
        put(summary)
    else:
        print(f"{summary['tokens']:,} tokens, {summary['shards']} shards, {summary['bytes'] / 1e6:,.1f} MB in {out}")


def capture_files(
    engine: Engine,
    settings: Settings,
    files: list[Path],
    out: Path,
    hooks: list[str] | None,
    max_tokens: int,
    *,
    plan: TextPlan | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Captures into `out`; the counts of all processes together. Progress goes to stderr.

    `options` are those of `train.capture.capture`. Under torchrun the engine holds a whole model (`load_whole`).
    """
    from llama_3.hub import resolve_model
    from train.alarm import rank, together
    from train.capture import capture as run
    from train.capture import summarise
    from train.text import TextCounts

    check_files(files)
    if max_tokens < 1:
        raise SteerError(f"--max-tokens is {max_tokens}", "give at least 1")
    model = resolve_model(settings.model) if settings.model else DEMO_MODEL
    counts, points = TextCounts(), hooks_of(engine, hooks)
    with _going_on(), together() as look:
        run(
            engine.model,
            engine.tokenizer,
            sources(files),
            out,
            points,
            max_tokens,
            plan=plan,
            chat=engine.chat_format,
            provenance=hashes(model),
            on_progress=lambda progress: narrate(str(progress)),
            on_notice=narrate,
            on_batch=look,
            counts=counts,
            rank=rank(),
            ranks=world(),
            **options,
        )
    for number, what in ((counts.duplicates, "copies left out"), (counts.cut, "long sentences cut")):
        if number:
            narrate(f"{number:,} {what}")
    if counts.dropped:
        narrate(f"{counts.dropped:,} rows dropped: sentences over the limit, or a last context that was not full")
    return asdict(summarise(out, points))


@contextmanager
def _going_on() -> Iterator[None]:
    """Tells whoever interrupts that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        narrate("what was written stays; the same command goes on with it")
        raise


def hooks_of(engine: Engine, hooks: list[str] | None) -> list[str]:
    """The hooks that were asked for; else the SAE's, else the block at 60% of the depth."""
    return hooks or [engine.info.hook or f"blocks.{int(0.6 * len(engine.model.blocks))}.hook_resid_post"]


def load_whole(settings: Settings) -> Engine:
    """The engine, whose model is whole in each process of torchrun, on a card of its own where there are cards."""
    if world() == 1:
        return engines.load_for_measuring(settings)
    from llama_3.chat_format import load_chat_format
    from llama_3.checkpoint import load_model
    from llama_3.config import read_config
    from llama_3.hub import resolve_model
    from llama_3.parallel import main_first, own_device
    from llama_3.tokenizer import check_vocabulary, load_tokenizer
    from sae.checkpoint import load_sae
    from steer.device import check_fit, choose_placement
    from steer.engine import Engine

    if settings.scheme or settings.compile:
        raise SteerError("several processes capture from a model as it is stored", "leave out --quantize and --compile")
    path = main_first(partial(resolve_model, settings.model)) if settings.model else DEMO_MODEL
    sae = settings.sae or (None if settings.model else DEMO_SAE)
    where = choose_placement(settings.device, settings.dtype, path)
    device, config = own_device(where.device), read_config(path)
    check_fit(config, path, where)
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, config)
    spelled = load_chat_format(path, tokenizer, settings.chat_format)
    if settings.threads:
        import torch

        torch.set_num_threads(settings.threads)
    model = load_model(path, where.dtype, device)
    return Engine(model, tokenizer, load_sae(Path(sae)) if sae else None, chat_format=spelled)


def sources(files: list[Path]) -> list[Path | str]:
    """The files as text is read from: what begins `hf:` is a name, not a path."""
    return [str(file) if str(file).startswith("hf:") else file for file in files]


def check_files(files: list[Path]) -> None:
    """`SteerError` naming the first file that is not there, before anything is loaded or written."""
    for file in files:
        if not str(file).startswith("hf:") and not file.exists():
            raise SteerError(f"there is no file `{file}`")


def check_price(price_per_hour: float | None, dry_run: bool) -> None:
    """`SteerError` for a price that nothing would be told about, or that is none."""
    if price_per_hour is not None and not dry_run:
        raise SteerError("--price-per-hour is for --dry-run alone", "add --dry-run")
    if price_per_hour is not None and not 0 <= price_per_hour < float("inf"):
        raise SteerError(f"--price-per-hour is {price_per_hour:g}", "give 0 or more")


def hashes(model: Path) -> dict[str, str]:
    """SHA-256 of a model's weights, configuration and tokenizer, by file name."""
    from llama_3.checkpoint import weight_files
    from llama_3.tokenizer import model_folders
    from train.shards import sha256_of

    kept = ("config.json", "params.json", "tokenizer.json", "tokenizer.model")
    files = [file for folder in model_folders(model) for name in kept if (file := folder / name).is_file()]
    return {file.name: sha256_of(file) for file in (*weight_files(model), *reversed(files))}

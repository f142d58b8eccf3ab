"""`steer capture`: text in, activations out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli import engines
from steer.cli.options import Json, command, narrate, put
from steer.config import DEMO_MODEL, Settings
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.engine import Engine

Files = Annotated[list[Path], typer.Argument(help="Text: .txt, .jsonl, .parquet, also .gz and .xz.", metavar="FILE...")]
Hooks = Annotated[
    list[str] | None,
    typer.Option(
        "--hook", help="As blocks.4.hook_resid_post; repeatable. Default: the SAE's, else at 60% depth.", metavar="HOOK"
    ),
]
MOST_TOKENS = 4_000_000


@command()
def capture(
    settings: Settings,
    files: Files,
    out: Annotated[Path, typer.Option(help="Folder for the activations.", metavar="DIR")],
    hook: Hooks = None,
    max_tokens: Annotated[int, typer.Option(help="Rows to capture at most.", metavar="N")] = MOST_TOKENS,
    json: Json = False,
) -> None:
    """Run the model over text and write its activations to shards; run again, it goes on."""
    summary = capture_files(engines.load_engine(settings), settings, files, out, hook, max_tokens)
    if json:
        put(summary)
    else:
        print(f"{summary['tokens']:,} tokens, {summary['shards']} shards, {summary['bytes'] / 1e6:,.1f} MB in {out}")


def capture_files(
    engine: Engine, settings: Settings, files: list[Path], out: Path, hooks: list[str] | None, max_tokens: int
) -> dict[str, Any]:
    """Captures into `out`; the counts. Progress goes to stderr."""
    from llama_3.hub import resolve_model
    from train.capture import capture as run

    check_files(files)
    if max_tokens < 1:
        raise SteerError(f"--max-tokens is {max_tokens}", "give at least 1")
    model = resolve_model(settings.model) if settings.model else DEMO_MODEL
    summary = run(
        engine.model,
        engine.tokenizer,
        files,
        out,
        hooks or [engine.info.hook or f"blocks.{int(0.6 * len(engine.model.blocks))}.hook_resid_post"],
        max_tokens,
        chat=engine.chat_format,
        provenance=hashes(model),
        on_progress=lambda done, of: narrate(f"captured {done:,} of at most {of:,} tokens"),
    )
    return asdict(summary)


def check_files(files: list[Path]) -> None:
    """`SteerError` naming the first file that is not there, before anything is loaded or written."""
    for file in files:
        if not file.is_file():
            raise SteerError(f"there is no file `{file}`")


def hashes(model: Path) -> dict[str, str]:
    """SHA-256 of a model's weights, configuration and tokenizer, by file name."""
    from llama_3.checkpoint import weight_files
    from llama_3.tokenizer import model_folders
    from train.shards import sha256_of

    kept = ("config.json", "params.json", "tokenizer.json", "tokenizer.model")
    files = [file for folder in model_folders(model) for name in kept if (file := folder / name).is_file()]
    return {file.name: sha256_of(file) for file in (*weight_files(model), *reversed(files))}

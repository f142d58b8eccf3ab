"""`steer evaluate`: what an SAE keeps of the model, and what it costs the model."""

from __future__ import annotations

import json as jsons
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from steer.cli import engines
from steer.cli.options import Json, command, narrate, put
from steer.cli.split import Sources
from steer.config import Settings
from steer.errors import SteerError
from steer.files import write_whole

if TYPE_CHECKING:
    from train.intervals import Metric


@command()
def evaluate(
    settings: Settings,
    files: Sources,
    sections: Annotated[
        str, typer.Option(help="What to measure, with commas between.", metavar="NAMES")
    ] = "reconstruction,downstream",
    report: Annotated[
        Path | None, typer.Option(help="Also write all of it as JSON, or as a table in Markdown (.md).", metavar="FILE")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Tokens to read, from the beginning of the text.", metavar="N")
    ] = 100_000,
    held_out: Annotated[
        float, typer.Option(help="Read only the documents that a split of this share holds out.", metavar="SHARE")
    ] = 0.0,
    split_seed: Annotated[int, typer.Option(help="Of that split.", metavar="N")] = 0,
    unit: Annotated[Literal["context", "packed", "sentence"], typer.Option(help="How documents become rows.")] = (
        "context"
    ),
    context: Annotated[int, typer.Option(help="Tokens of a row (default 512; sentences 192).", metavar="N")] = 0,
    seed: Annotated[int, typer.Option(help="Of the intervals' resamples.", metavar="N")] = 0,
    json: Json = False,
) -> None:
    """Measure an SAE on text: reconstruction, and the model's loss with it spliced in. Each with a 95% interval."""
    from train.documents import list_sources
    from train.evaluate import assess
    from train.text import TextPlan

    if max_tokens < 1:
        raise SteerError(f"--max-tokens is {max_tokens}", "give at least 1")
    if report is not None and not report.absolute().parent.is_dir():
        raise SteerError(f"there is no folder `{report.parent}` for the report")
    sources = list_sources(files)
    part: Literal["held-out", "all"] = "held-out" if held_out else "all"
    plan = TextPlan(unit=unit, context=context, held_out=held_out, part=part, split_seed=split_seed)
    engine = engines.load_for_measuring(settings)
    if engine.sae is None:
        raise SteerError("there is no SAE to evaluate", "pass `--sae FOLDER`")
    told = 0

    def tell(done: int, of: int) -> None:
        nonlocal told
        if done == of or done >= told + of / 10:
            told = done
            narrate(f"measured {done:,} of {of:,} tokens")

    found = assess(
        engine.model,
        engine.sae,
        engine.tokenizer,
        sources,
        max_tokens,
        sections=[name.strip() for name in sections.split(",") if name.strip()],
        plan=plan,
        chat=engine.chat_format,
        seed=seed,
        on_progress=tell,
    )
    about = {
        "model": engine.info.model,
        "sae": settings.describe()["sae"],
        "hook": engine.sae.config.hook,
        "files": [str(file) for file in files],
        "text": asdict(plan),
        "tokens": found.tokens,
        "documents": found.documents,
    }
    if report is not None:
        write_report(report, about, found.metrics)
    if json:
        for metric in found.metrics:
            put(asdict(metric))
    else:
        print("\n".join(_table(found.metrics)))
        print(f"{found.tokens:,} tokens of {found.documents:,} documents; 95% intervals")


def write_report(file: Path, about: dict[str, Any], metrics: list[Metric]) -> None:
    """Writes the measures and what they were made from: Markdown where the name ends in .md, else JSON."""
    from train.evaluate import METRICS

    if file.suffix.lower() == ".md":
        meanings = {name: meaning for section in METRICS.values() for name, meaning in section.items()}
        lines = [f"- {name}: {_plain(value)}" for name, value in about.items()]
        lines += ["", "| metric | value | low | high | meaning |", "|---|---:|---:|---:|---|"]
        for each in metrics:
            numbers = " | ".join(_number(value) for value in (each.value, each.low, each.high))
            lines.append(f"| {each.metric} | {numbers} | {meanings[each.metric]} |")
        lines += ["", "low and high: 95% interval by a bootstrap over documents; of `dead` over latents (Wilson)."]
        text = "\n".join(lines)
    else:
        rows = [
            {name: value if name == "metric" or math.isfinite(value) else None for name, value in asdict(each).items()}
            for each in metrics
        ]
        text = jsons.dumps(about | {"metrics": rows}, indent=1)
    write_whole(file, f"{text}\n".encode())


def _plain(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _number(value: float) -> str:
    return f"{value:.5g}" if math.isfinite(value) else "-"


def _table(metrics: list[Metric]) -> list[str]:
    lines = [f"{'metric':<20}{'value':>12}{'low':>12}{'high':>12}"]
    return lines + [
        f"{each.metric:<20}{_number(each.value):>12}{_number(each.low):>12}{_number(each.high):>12}" for each in metrics
    ]

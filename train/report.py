"""`report`: a run as PNG files and one HTML file that needs nothing beside it; a sweep as such for each of its runs.

It reads what the trainer left (`config.toml`, `metrics.jsonl`, `activity/`, the SAE or the newest checkpoint), at any
moment of a run and whatever is missing: a picture without data is left out, and the page says why. Text out of these
files is escaped, and the page forbids itself scripts and anything from outside.
"""

import base64
import html
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from safetensors import SafetensorError, safe_open

from train.activity import Change, Snapshot, changes, read_activity, silence_histogram
from train.errors import TrainError
from train.floor import Array, Floor, fit_floor
from train.metrics import read_metrics
from train.pictures import (
    Entry,
    draw_activity,
    draw_b_enc,
    draw_dead,
    draw_density,
    draw_loss,
    draw_parts,
    draw_speed,
    negative_share,
    number,
    png,
    series,
)

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }}
img {{ max-width: 100%; }}
td {{ padding: 0 1.5em 0 0; }}
td + td {{ font-variant-numeric: tabular-nums; }}
</style>
<h1>{title}</h1>
<table>{facts}</table>
{body}
<h2>Config</h2>
<table>{config}</table>
</html>
"""
ENOUGH_OCTAVES = 31
"""A snapshot counts no silence longer than that."""


@dataclass
class _Page:
    """What has been found so far: facts in words, pictures by name, and what could not be drawn."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[tuple[str, str, bytes]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, caption: str, figure: Any) -> None:
        if figure is None:
            self.notes.append(f"No picture of {name.replace('_', ' ')}: the run has no figures for it.")
        else:
            self.pictures.append((name, caption, png(figure)))


def report(run: Path, out: Path | None = None) -> Path:
    """Draws the run in `run` into `out` (default `RUN/report`): PNG files and `report.html`, whose path comes back. In
    the folder of a sweep it draws each run into a folder of its own, and a page that compares them.

    Raises `TrainError` if there is no run, it has no step in its metrics yet, or matplotlib is not installed.
    """
    run = Path(run)
    out = Path(out) if out else run / "report"
    if not (run / "config.toml").is_file() and (members := sorted(run.glob("*/config.toml"))):
        return _report_sweep(run, [file.parent for file in members], out)
    config = _config(run)
    entries = [entry for entry in read_metrics(run / "metrics.jsonl") if number(entry.get("step")) is not None]
    if not entries:
        raise TrainError(
            f"the run in {run} has no step in its metrics.jsonl yet", "wait for the first one to be logged"
        )
    page = _Page()
    _facts(page, entries, (run / "sae" / "cfg.json").is_file())
    _loss(page, entries)
    page.add("loss_parts", "Parts of the loss, and the norm of the gradient before clipping.", draw_parts(entries))
    page.add("dead", "Dead latents as the trainer counts them, and how many are active at a token.", draw_dead(entries))
    _activity(page, run / "activity", config)
    _density(page, entries)
    _bias(page, run)
    page.add(
        "speed",
        "Learning rate, speed, and the share of the time in which the trainer waited for data.",
        draw_speed(entries),
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, _, image in page.pictures:
        _write(out / f"{name}.png", image)
    _write(out / "report.html", _html(run, page, config).encode())
    return out / "report.html"


def _report_sweep(run: Path, members: list[Path], out: Path) -> Path:
    """The page of a sweep: a line for each run with its newest figures, best held-out (else training) FVU first."""
    rows: list[tuple[float, str]] = []
    notes: list[str] = []
    fault: TrainError | None = None
    for member in members:
        try:
            report(member, out / member.name)
        except TrainError as error:
            fault = error
            notes.append(f"<p>{html.escape(f'{member.name}: {error}')}</p>")
            continue
        entries = list(read_metrics(member / "metrics.jsonl"))
        values = {key: series(entries, key)[1] for key in ("step", "held_out_fvu", "fvu", "l0", "dead", "loss")}
        last = {key: float(found[-1]) for key, found in values.items() if len(found)}
        name = html.escape(member.name)
        cells = [f'<a href="{quote(member.name)}/report.html">{name}</a>']
        cells += [f"{last[key]:,.{0 if key == 'step' else 4}f}" if key in last else "" for key in values]
        line = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append((last.get("held_out_fvu", last.get("fvu", np.inf)), f"<tr>{line}</tr>"))
    if fault and not rows:
        raise fault
    heads = ("run", "step", "held-out FVU", "FVU", "L0", "dead", "loss")
    lines = [f"<tr>{''.join(f'<td>{head}</td>' for head in heads)}</tr>", *(line for _, line in sorted(rows))]
    page = PAGE.format(title=html.escape(f"Sweep {run.name}"), facts="\n".join(lines), body="\n".join(notes), config="")
    _write(out / "report.html", page.replace("<h2>Config</h2>\n<table></table>\n", "").encode())
    return out / "report.html"


def _config(run: Path) -> dict[str, Any]:
    file = run / "config.toml"
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TrainError(
            f"there is no run in {run} (no config.toml)", "give the folder of steer train --out"
        ) from error
    except (OSError, ValueError) as error:
        raise TrainError(f"{file} is not the config of a run ({error})") from error


def _facts(page: _Page, entries: list[Entry], finished: bool) -> None:
    """The newest value of everything that has one."""
    last = entries[-1]
    of = number(last.get("steps"))
    page.facts.append(("state", "finished" if finished else "not finished"))
    page.facts.append(("steps", f"{last['step']:,.0f}" + (f" of {of:,.0f}" if of else "")))
    shown = {"tokens": ",.0f", "loss": ".5g", "fvu": ".4f", "held_out_fvu": ".4f", "l0": ".1f", "dead": ".2%"}
    for key, style in (shown | {"grad_norm": ".3g", "lr": ".3g"}).items():
        values = series(entries, key)[1]
        if len(values):
            page.facts.append((key.replace("_", " ").replace("fvu", "FVU"), format(values[-1], style)))
    speeds = series(entries, "tokens_per_second")[1]
    if len(speeds):
        page.facts.append(("tokens a second, median", f"{np.median(speeds):,.0f}"))


def _loss(page: _Page, entries: list[Entry]) -> None:
    tokens_N, loss_N = series(entries, "loss")
    floor = fit_floor(tokens_N, loss_N) if len(loss_N) else None
    page.add(
        "loss", _floor_text(floor, entries) if floor else "FVU in training and held out.", draw_loss(entries, floor)
    )
    if floor:
        told = f"no: {floor.why}" if floor.why else f"{floor.loss:.5g} ({floor.low:.5g} to {floor.high:.5g})"
        page.facts.append(("loss floor", told))


def _floor_text(floor: Floor, entries: list[Entry]) -> str:
    """What the fit says, or why it says nothing, and what it cannot know."""
    if floor.why:
        return f"No floor of the loss is given: {floor.why}."
    text = (
        f"Fitted to the {floor.points:,} losses of the second half, t in tokens: "
        f"L(t) = {floor.loss:.5g} + {floor.a:.4g} t^-{floor.b:.3g}. "
        f"95% of the redraws of its blocks put the floor between {floor.low:.5g} and {floor.high:.5g}."
    )
    at, rates = series(entries, "lr")
    half = rates[at >= floor.first]
    if len(half) and half.min() < 0.9 * half.max():
        text += " The learning rate changed meanwhile, of which the curve knows nothing."
    return text


def _activity(page: _Page, folder: Path, config: dict[str, Any]) -> None:
    """Births, deaths and silence, in one pass over the snapshots."""
    after = number(_setting(config, "dead_after"))
    if not after or after < 1:
        page.notes.append("No picture of activity: config.toml does not say after how many tokens a latent is dead.")
        return
    tokens: list[int] = []
    shares: list[Array] = []

    def seen() -> Iterator[Snapshot]:
        for shot in read_activity(folder):
            tokens.append(shot.tokens)
            shares.append(silence_histogram(shot.silent_F, ENOUGH_OCTAVES).numpy())
            yield shot

    found: list[Change] = []
    try:
        found.extend(changes(seen(), int(after)))
    except TrainError as error:
        page.notes.append(f"The activity ends early: {error}.")
    if found:
        page.facts.append(("births", f"{sum(change.births for change in found):,}"))
        page.facts.append(("deaths", f"{sum(change.deaths for change in found):,}"))
        page.facts.append((f"silent for {after:,.0f} tokens", f"{found[-1].dead:,} of {found[-1].latents:,} latents"))
    caption = f"A latent is dead after {after:,.0f} silent tokens; snapshots do not see what lies between them."
    last = max((int(np.flatnonzero(share)[-1]) for share in shares), default=0)
    octaves = min(ENOUGH_OCTAVES, max(last, int(after).bit_length())) + 1
    shares = [share[:octaves] for share in shares[: len(found)]]
    page.add("activity", caption, draw_activity(found, tokens[: len(found)], shares, int(after)))


def _setting(config: dict[str, Any], name: str) -> Any:
    """A value of the config, at the top or in one of its tables."""
    tables = [config, *(value for value in config.values() if isinstance(value, dict))]
    return next((table[name] for table in tables if name in table), None)


def _density(page: _Page, entries: list[Entry]) -> None:
    held = [entry for entry in entries if isinstance(entry.get("density"), dict)]
    figure, step, never = None, 0, ""
    if held:
        step = held[-1]["step"]
        if (count := number(held[-1]["density"].get("never"))) is not None:
            never = f" {count:,.0f} never were, and are not in the picture."
        try:
            figure = draw_density(held[-1]["density"]["edges"], held[-1]["density"]["counts"])
        except (KeyError, TypeError, ValueError):
            page.notes.append(f"The density of step {step} is not a histogram.")
    page.add("density", f"How often each latent was active before step {step:,}.{never}", figure)


def _bias(page: _Page, run: Path) -> None:
    b_enc_F, where = read_b_enc(run)
    page.add("biases", "b_enc, the bias of the encoder.", draw_b_enc(b_enc_F, where))
    if len(b_enc_F):
        page.facts.append(("b_enc below 0", f"{negative_share(b_enc_F):.2%}"))


def read_b_enc(run: Path) -> tuple[Array, str]:
    """The encoder's bias, (F,) float64, of the finished SAE or else of the newest checkpoint that is whole, and which
    it is; empty if there is neither. A checkpoint's is at the scale of the trainer's inputs."""
    kept = [file for file in (run / "checkpoints").glob("*.safetensors") if file.stem.isdecimal()]
    for file in (run / "sae" / "sae.safetensors", *sorted(kept, reverse=True)):
        try:
            parts: list[Array] = []
            slices = 1
            while len(parts) < slices:  # a dictionary spread over processes has a file for each
                name = f"{file.stem}.{len(parts)}.safetensors" if parts else file.name
                with safe_open(file.with_name(name), framework="pt") as stored:
                    slices = int((stored.metadata() or {}).get("shards", 1))
                    parts.append(stored.get_tensor("b_enc").double().reshape(-1).numpy())
        except (SafetensorError, OSError, KeyError, ValueError):
            continue
        where = "of the finished SAE" if file.parent.name == "sae" else f"at step {int(file.stem):,}"
        return np.concatenate(parts), where
    return np.empty(0), ""


def _html(run: Path, page: _Page, config: dict[str, Any]) -> str:
    def rows(pairs: list[tuple[str, str]]) -> str:
        return "\n".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in pairs)

    body = [
        f"<h2>{name.replace('_', ' ').capitalize()}</h2>\n<p>{html.escape(caption)}</p>\n"
        f'<img alt="{name.replace("_", " ")}" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
        for name, caption, image in page.pictures
    ]
    body += [f"<p>{html.escape(note)}</p>" for note in page.notes]
    pairs = [(str(name), str(value)) for name, value in config.items()]
    title = html.escape(f"Run {run.resolve().name}")
    return PAGE.format(title=title, facts=rows(page.facts), body="\n".join(body), config=rows(pairs))


def _write(file: Path, content: bytes) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, file)

"""Do calibrated figures say which features steer? The tables and the picture of docs/calibration.md.

    python -m benchmarks.calibration measure INDEX     # calibrate 250 latents, into a copy of the demo's index
    python -m benchmarks.calibration compare INDEX     # replies with the picks of each topic, into INDEX.replies.jsonl
    python -m benchmarks.calibration tables INDEX --picture docs/calibration.png
    python -m benchmarks.calibration ship INDEX        # put the calibrations into the index that ships

`measure` and `compare` go on where they were stopped. The latents are the first six hits of the label search for each
topic of `steering_topics.toml`, and live ones drawn by a fixed seed up to 250.

Of the hits for a topic one is picked: the first by label match or the first by `sort:steer`. Each pick writes 50
replies (seeds 0 to 49, 60 tokens) to "Once upon a time" at its own sweet spot, and where the two differ at 0.4x too;
the hit rate is the share of replies with a word of the topic. A latent without a sweet spot is pushed as far as
perplexity allows, which is the bound of a sweet spot too. Nothing is chosen on these replies: not the words, the
latents, the strengths or how steerability is defined. Intervals are of a bootstrap over topics.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sqlite3
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import torch
from torch import Tensor

from benchmarks.steering import mentions, write
from labels.index import Feature, LabelIndex
from labels.query import parse
from steer.analysis.calibrate import CLIFF_RATIO, SWEET_RATIO, Calibrator, keep, recall
from steer.config import DEMO_LABELS
from steer.engine import Engine
from train.intervals import RESAMPLES, DocumentSums, Metric

HERE = Path(__file__).parent
HITS, LATENTS = 6, 250
SEEDS, TOKENS = range(50), 60
COMMON = 0.4
"""The one strength at which picks are compared too, times the latent's max: `steering.py` takes it most often."""
FIRST = (10, 20, 30)
PICKS = ("label match", "steerability")
Entry = dict[str, Any]
Topics = dict[str, list[str]]


def candidates(index: LabelIndex, topics: Topics) -> list[int]:
    """First all first hits, then all second ones and so on; then live latents that no topic finds."""
    hits = [[feature.latent for feature in index.search(topic, HITS)] for topic in topics]
    found = dict.fromkeys(one[depth] for depth in range(HITS) for one in hits if depth < len(one))
    others = [feature.latent for feature in index.search("max:>0", 1 << 20) if feature.latent not in found]
    return [*found, *random.Random(0).sample(others, min(len(others), max(0, LATENTS - len(found))))]


def picks(index: LabelIndex, topic: str) -> dict[str, Feature]:
    """The hit that each way of sorting puts first, all among the same ones; {} where there is no hit."""
    hits = {feature.latent: feature for feature in index.search(topic, HITS)}
    if not hits:
        return {}
    steerable = next(each for each in index.search(f"{topic} sort:steer", 1 << 20) if each.latent in hits)
    first, *_ = hits.values()
    return dict(zip(PICKS, (first, steerable), strict=True))


def find(index: LabelIndex, topics: Topics) -> dict[str, dict[str, Feature]]:
    """The picks of every topic that has a hit."""
    return {topic: one for topic in topics if (one := picks(index, topic))}


def differing(found: dict[str, dict[str, Feature]]) -> list[str]:
    """The topics whose picks are not the same latent."""
    return [topic for topic, one in found.items() if len({feature.latent for feature in one.values()}) > 1]


def entry_of(index: LabelIndex, latent: int) -> Entry:
    """All trials of a latent."""
    known = index.calibration(latent)
    assert known is not None, latent
    entry: Entry = json.loads(known.data)
    return entry


def own_strength(entry: Entry) -> float:
    """The sweet spot, else the greatest strength within its bound of damage, else the least."""
    tried = [trial for trial in entry["trials"] if trial["strength"] > 0]
    mild = [trial["strength"] for trial in tried if trial["ratio"] <= SWEET_RATIO]
    return float(entry["sweet"] or max(mild, default=tried[0]["strength"]))


def mean_over(values: Sequence[float]) -> Metric:
    """The mean of a value a topic, with its 95% interval over topics."""
    sums, N = DocumentSums(), len(values)
    sums.add(torch.arange(N), value=torch.tensor(values, dtype=torch.float64), one=torch.ones(N))
    return sums.metrics({"mean": lambda total: total["value"] / total["one"]}, seed=0)[0]


def first_rate(hits: Tensor, key: Tensor, first: int) -> Tensor:
    """The mean of the `first` of hits (..., N) sorted by falling key (..., N)."""
    return hits.gather(-1, key.argsort(dim=-1, descending=True, stable=True)[..., :first]).mean(-1)


def more_first(hits: Sequence[float], better: Sequence[float], other: Sequence[float], first: int) -> Metric:
    """How much more the `first` by one key have than those by another, with its 95% interval over topics."""
    hits_N, better_N, other_N = (torch.tensor(each, dtype=torch.float64) for each in (hits, better, other))
    drawn_RN = torch.randint(len(hits), (RESAMPLES, len(hits)), generator=torch.Generator().manual_seed(0))
    drawn_RN = torch.cat([torch.arange(len(hits))[None], drawn_RN])
    less_R = first_rate(hits_N[drawn_RN], better_N[drawn_RN], first) - first_rate(
        hits_N[drawn_RN], other_N[drawn_RN], first
    )
    low, high = torch.quantile(less_R[1:], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Metric(f"first {first}", float(less_R[0]), low, high)


def ranks_agree(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; ties share their mean rank."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(other < each for other in values) + (values.count(each) - 1) / 2 for each in values]

    stacked = torch.tensor([ranks(list(a)), ranks(list(b))], dtype=torch.float64)
    return float(torch.corrcoef(stacked)[0, 1])


def measure(index: Path, topics: Topics, threads: int) -> None:
    """Calibrates every candidate that is not in the index yet."""
    if not index.exists():
        shutil.copyfile(DEMO_LABELS, index)
        with sqlite3.connect(index) as db:
            db.execute("DELETE FROM calibrations")  # what ships was made so before
    calibrator = Calibrator(Engine.load(threads=threads))
    how = calibrator.how
    with LabelIndex(index) as store:
        latents = candidates(store, topics)
        for number, latent in enumerate(latents, 1):
            if recall(store, latent, how) is None:
                keep(calibrator.calibrate(latent), how, store)
                print(f"{number} of {len(latents)}", file=sys.stderr)


def replies_file(index: Path) -> Path:
    return index.with_name(f"{index.name}.replies.jsonl")


def read_replies(index: Path) -> dict[tuple[int | None, float], Entry]:
    """What `compare` has written, by latent and strength; the baseline has latent None and strength 0."""
    file = replies_file(index)
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {(one["latent"], one["strength"]): one for one in map(json.loads, lines)}


def compare(index: Path, topics: Topics, threads: int) -> None:
    """Writes the replies of every pick that are not there yet, the baseline's first."""
    done = read_replies(index)
    wanted: list[tuple[int | None, float]] = [(None, 0.0)]
    with LabelIndex(index) as store:
        found = find(store, topics)
        for strength, some in ((None, list(found)), (COMMON, differing(found))):
            latents = [found[topic][name].latent for name in PICKS for topic in some]
            wanted += [(latent, strength or own_strength(entry_of(store, latent))) for latent in latents]
    left = [one for one in dict.fromkeys(wanted) if one not in done]
    engine = Engine.load(threads=threads)
    for number, (latent, strength) in enumerate(left, 1):
        edit = None if latent is None else f"{latent} +{strength:g}x"
        texts, perplexity = write(engine, edit, SEEDS, TOKENS)
        line = {"latent": latent, "strength": strength, "perplexity": perplexity, "texts": texts}
        with replies_file(index).open("a", encoding="utf-8") as file:
            print(json.dumps(line), file=file)
        print(f"{number} of {len(left)}", file=sys.stderr)


def hit_rate(texts: Sequence[str], words: Sequence[str]) -> float:
    """The share of replies with at least one of the words."""
    return fmean(mentions([text], words) > 0 for text in texts)


def told(metric: Metric, form: str = ".1%") -> str:
    return f"{metric.value:{form}} ({metric.low:{form}} to {metric.high:{form}})"


def tell_picks(store: LabelIndex, index: Path, topics: Topics) -> None:
    """The table of picks, and how far steerability tells which first hits will steer."""
    replies = read_replies(index)
    base = replies[None, 0.0]
    found = find(store, topics)
    differ = differing(found)
    print("\n| topics | strength | pick | hit rate | less label match | perplexity, times |")
    print("|---|---|---|---:|---:|---:|")
    plain = [hit_rate(base["texts"], topics[topic]) for topic in found]
    print(f"| all {len(found)} | | no edit | {told(mean_over(plain))} | | 1.00 |")
    rates: dict[tuple[str, float | None], dict[str, float]] = {}
    for title, some, strength in (
        (f"all {len(found)}", list(found), None),
        (f"{len(differ)} with two picks", differ, COMMON),
        (f"{len(differ)} with two picks", differ, None),
    ):
        for name in PICKS:
            written = {
                topic: replies[latent, strength or own_strength(entry_of(store, latent))]
                for topic in some
                for latent in [found[topic][name].latent]
            }
            own = {topic: hit_rate(one["texts"], topics[topic]) for topic, one in written.items()}
            rates[name, strength] = rates.get((name, strength), {}) | own
            less = mean_over([rate - rates[PICKS[0], strength][topic] for topic, rate in own.items()])
            damage = median(one["perplexity"] / base["perplexity"] for one in written.values())
            shown = "" if name == PICKS[0] else told(less)
            at = f"{strength}x" if strength else "its own"
            print(f"| {title} | {at} | {name} | {told(mean_over(list(own.values())))} | {shown} | {damage:.2f} |")
    for topic in differ:
        first, best = (found[topic][name] for name in PICKS[:2])
        each = [f"{rates[name, None][topic]:.0%}" for name in PICKS[:2]]
        pair = [f"{one.latent} ({one.label}) {rate}" for one, rate in zip((first, best), each, strict=True)]
        print(f"{topic}: {pair[0]}; {pair[1]}", file=sys.stderr)
    tell_sorted(index, found, rates[PICKS[0], None])


def tell_sorted(index: Path, found: dict[str, dict[str, Feature]], rates: dict[str, float]) -> None:
    """The first hits of all topics as one list, sorted by how well the label matches or by steerability."""
    with sqlite3.connect(index) as db:
        sql = "SELECT -rank FROM words WHERE words MATCH ? AND rowid = ?"
        match = [db.execute(sql, (parse(t).match, one[PICKS[0]].latent)).fetchone()[0] for t, one in found.items()]
    steerability = [one[PICKS[0]].steerability or 0.0 for one in found.values()]
    hits = list(rates.values())
    title = f"the {len(hits)} first hits, sorted by"
    print(f"\n| {title} | {' | '.join(f'first {n}' for n in FIRST)} | all | rank correlation |")
    print(f"|---|{'---:|' * (len(FIRST) + 2)}")
    for name, key in zip(PICKS, (match, steerability), strict=True):
        rated = [float(first_rate(torch.tensor(hits), torch.tensor(key), n)) for n in (*FIRST, len(hits))]
        print(f"| {name} | {' | '.join(f'{rate:.1%}' for rate in rated)} | {ranks_agree(key, hits):.2f} |")
    more = [told(more_first(hits, steerability, match, n)) for n in FIRST]
    print(f"| steerability less label match | {' | '.join(more)} | | |")


def tell_latents(store: LabelIndex) -> None:
    """Quantiles over all calibrated latents, the most steerable and some of the least."""
    features = store.search("sort:steer", 1 << 20)
    without = [sum(getattr(each, name) is None for each in features) for name in ("sweet", "cliff")]
    print(f"{len(features)} latents; {without[0]} without a sweet spot, {without[1]} without a cliff up to the end\n")
    print("| | 10% | 25% | median | 75% | 90% |\n|---|---:|---:|---:|---:|---:|")
    for name in ("sweet", "cliff", "steerability"):
        known = [value for each in features if (value := getattr(each, name)) is not None]
        cuts = quantiles(known, n=20, method="inclusive")
        print(f"| {name} | {' | '.join(f'{cuts[place]:.2f}' for place in (1, 4, 9, 14, 17))} |")
    print("\n| latent | label | targets | sweet spot | cliff | steerability | perplexity, times |")
    print("|---|---|---|---:|---:|---:|---:|")
    for each in [*features[:12], *features[-4:]]:
        entry = entry_of(store, each.latent)
        [trial] = [trial for trial in entry["trials"] if trial["strength"] == (each.sweet or 0.0)]
        words_first = sorted(entry["targets"], key=lambda target: not target.startswith(" "))
        targets = ", ".join(f"`{target.strip()}`" for target in words_first[:5]).replace("|", "\\|")
        spots = [f"{spot:g}x" if spot else "none" for spot in (each.sweet, each.cliff)]
        label = each.label.replace("|", "\\|")
        figures = f"{' | '.join(spots)} | {each.steerability:.2f} | {trial['ratio']:.2f}"
        print(f"| {each.latent} | {label} | {targets} | {figures} |")


def draw(store: LabelIndex, file: Path) -> None:
    """Effect against damage: a faint line a latent through its strengths, its sweet spot, and the medians."""
    from matplotlib.figure import Figure

    entries = [entry_of(store, each.latent) for each in store.search("sort:steer", 1 << 20)]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for entry in entries:
        points = [(trial["ratio"], trial["effect"]) for trial in entry["trials"]]
        axis.plot(*zip(*points, strict=True), color="tab:blue", linewidth=0.5, alpha=0.15)
    sweet = [(t["ratio"], t["effect"]) for one in entries for t in one["trials"] if one["sweet"] == t["strength"]]
    axis.scatter([x for x, _ in sweet], [y for _, y in sweet], s=8, color="tab:green", zorder=3, label="sweet spots")
    middle = [[median(one[name] for one in row) for name in ("ratio", "effect")] for row in _by_strength(entries)]
    axis.plot(*zip(*middle, strict=True), color="black", marker="o", markersize=4, label="medians at each strength")
    for row, (ratio, effect) in zip(_by_strength(entries), middle, strict=True):
        if row[0]["strength"] >= 0.4:
            label = f"{row[0]['strength']:g}x"
            axis.annotate(label, (ratio, effect), (5, -9), textcoords="offset points", fontsize=8)
    for ratio, style, name in ((SWEET_RATIO, "--", "sweet spot's bound"), (CLIFF_RATIO, ":", "cliff")):
        axis.axvline(ratio, color="tab:red", linestyle=style, linewidth=1, label=f"{ratio:g} times: {name}")
    axis.set(xscale="log", xlim=(0.7, 2000), ylim=(0.01, 100), yscale="log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="perplexity under the unsteered model, times the baseline's")
    axis.set(ylabel="effect: target tokens more in 100 (from 0.01 on)")
    axis.set(title=f"{len(entries)} latents of the demo, 0.1x to 2x of their max")
    axis.legend(fontsize=8, loc="lower right")
    figure.savefig(file, dpi=110)


def _by_strength(entries: Sequence[Entry]) -> Iterator[tuple[Entry, ...]]:
    return zip(*([trial for trial in entry["trials"] if trial["strength"]] for entry in entries), strict=True)


def ship(index: Path) -> None:
    """Copies all calibrations into the index that ships."""
    with LabelIndex(index) as store, LabelIndex(DEMO_LABELS) as shipped:
        found = [store.calibration(each.latent) for each in store.search("is:calibrated", 1 << 20)]
        shipped.write_calibrations(one for one in found if one is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("measure", "compare", "tables", "ship"))
    parser.add_argument("index", type=Path, help="a copy of the demo's index, made where there is none")
    parser.add_argument("--picture", type=Path, help="tables: draw effect against damage")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    topics: Topics = tomllib.loads((HERE / "steering_topics.toml").read_text())["topics"]
    if asked.step == "ship":
        ship(asked.index)
    elif asked.step != "tables":
        {"measure": measure, "compare": compare}[asked.step](asked.index, topics, asked.threads)
    else:
        with LabelIndex(asked.index) as store:
            tell_latents(store)
            tell_picks(store, asked.index, topics)
            if asked.picture:
                draw(store, asked.picture)


if __name__ == "__main__":
    main()

"""Does the direction do it? The controls of `steer controls` on topics of the demo: the table of docs/steering.md.

    python benchmarks/controls.py --topics book,bed,bear,fish,bird,moon,sun,dog,rain,boat

For each topic the edit of `steering_choices.json`, chosen on other seeds, and its words in `steering_topics.toml`.
Each condition writes 50 replies of 60 tokens to "Once upon a time"; "asked" has "A story about TOPIC. Once upon a time"
instead. A cell is the share of replies with a word of the topic (95% interval after Wilson), and the perplexity of the
replies under the unsteered model.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path
from statistics import fmean

from steer.analysis.controls import CONDITIONS, run_controls
from steer.cli.controls import ASKS
from steer.edits import Edit
from steer.engine import Engine
from steer.session import Prompt

HERE = Path(__file__).parent
PROMPT = "Once upon a time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topics", default="book,bed,bear,fish,bird,moon,sun,dog,rain,boat,snow,tree")
    parser.add_argument("--seeds", type=int, default=50)
    arguments = parser.parse_args()
    words: dict[str, list[str]] = tomllib.loads((HERE / "steering_topics.toml").read_text())["topics"]
    edits: dict[str, str] = json.loads((HERE / "steering_choices.json").read_text())
    engine = Engine.load(dtype="float32", device="cpu")
    print(f"| topic | edit | {' | '.join(CONDITIONS)} |\n|---|---|{'---:|' * len(CONDITIONS)}", flush=True)
    rates: dict[str, list[float]] = {name: [] for name in CONDITIONS}
    for topic in arguments.topics.split(","):
        asked = ASKS[False].replace("{topic}", topic).replace("{prompt}", PROMPT)
        found = run_controls(
            engine,
            Edit.parse(edits[topic]),
            words[topic],
            [Prompt(text=PROMPT)],
            [Prompt(text=asked)],
            seeds=arguments.seeds,
        )
        cells = []
        for one in found:
            rates[one.name].append(one.rate.value)
            cells.append(
                f"{one.rate.value:.0%} ({one.rate.low:.0%} to {one.rate.high:.0%}), {one.perplexity.value:.1f}"
            )
        print(f"| {topic} | `{edits[topic]}` | {' | '.join(cells)} |", flush=True)
    print(f"| mean | | {' | '.join(f'{fmean(rates[name]):.0%}' for name in CONDITIONS)} |")


if __name__ == "__main__":
    main()

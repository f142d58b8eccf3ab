"""One self-contained HTML page of an inspected text. Every text in it is escaped; it loads nothing."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from html import escape

from steer.events import TokenEvent, clean, clean_line
from steer.session import EngineInfo

STRONGEST = 200
"""Features that the page lists."""

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Features of a text</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.7 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
#text { white-space: pre-wrap; font-family: ui-monospace, monospace; }
#text span { border-radius: 3px; background: rgb(215 170 40 / var(--on, 0)); }
#text .special { opacity: .5; }
table { border-collapse: collapse; font-size: 14px; }
td, th { text-align: left; padding: 2px 12px 2px 0; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
tbody tr { cursor: pointer; }
tr.chosen { background: rgb(215 170 40 / .4); }
</style></head><body>
"""

_SCRIPT = """<script>
const spans = [...document.querySelectorAll("#text span")];
const hits = spans.map(span => new Map(JSON.parse(span.dataset.hits)));
for (const row of document.querySelectorAll("tbody tr")) row.onclick = row.onkeydown = event => {
  if (event.key && event.key !== "Enter") return;
  document.querySelector("tr.chosen")?.classList.remove("chosen");
  row.classList.add("chosen");
  const latent = Number(row.dataset.latent), most = Number(row.dataset.most);
  spans.forEach((span, i) => span.style.setProperty("--on", (hits[i].get(latent) ?? 0) / most));
};
document.querySelector("tbody tr")?.click();
</script>
"""


def page(tokens: Sequence[TokenEvent], names: dict[int, str], info: EngineInfo) -> str:
    """The page: the text, and its features; choosing one paints the tokens it is active on."""
    active: dict[int, list[float]] = defaultdict(list)
    for token in tokens:
        for hit in token.hits:
            active[hit.latent].append(hit.activation)
    order = sorted(active, key=lambda latent: (-max(active[latent]), latent))[:STRONGEST]
    made = escape(clean(f"{info.model}, {info.hook}"))
    spans = "".join(_span(token, names) for token in tokens)
    rows = "\n".join(_row(latent, active[latent], names.get(latent, "")) for latent in order)
    head = "<tr><th>latent</th><th>max</th><th>tokens</th><th>label</th></tr>"
    return (
        f'{_HEAD}<p>{made}</p>\n<p id="text">{spans}</p>\n'
        f"<table><thead>{head}</thead><tbody>\n{rows}\n</tbody></table>\n{_SCRIPT}</body></html>\n"
    )


def _span(token: TokenEvent, names: dict[int, str]) -> str:
    hits = json.dumps([[hit.latent, round(hit.activation, 3)] for hit in token.hits])
    told = [f"{hit.latent}  {hit.activation:.2f}  {clean_line(names.get(hit.latent, ''))}" for hit in token.hits[:8]]
    title = escape("\n".join([f"token {token.index}", *told]))
    kind = ' class="special"' if token.special else ""
    return f'<span{kind} title="{title}" data-hits="{escape(hits)}">{escape(clean(token.text))}</span>'


def _row(latent: int, activations: list[float], label: str) -> str:
    most = max(activations)
    cells = (latent, f"{most:.2f}", len(activations))
    numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
    told = f"<td>{escape(clean(label))}</td>"
    return f'<tr tabindex="0" data-latent="{latent}" data-most="{most:.6g}">{numbers}{told}</tr>'

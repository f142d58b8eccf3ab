"""Llama 3's vocabulary: byte strings by rank, merged within the words that a regular expression cuts (tiktoken).

A word that is itself a token is taken whole; else the adjacent pair whose union has the lowest rank merges first.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import tiktoken

from llama_3.errors import config_error
from llama_3.vocabulary import SpecialTokens, Vocabulary

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts text before byte-pair merging (Meta's llama-models, tokenizer.py)."""

# The same limits as Meta's: tiktoken overflows its stack on longer runs of spaces, or of anything else.
_MAX_CHUNK = 400_000
_MAX_RUN = 25_000
_RUNS = re.compile(r"\s+|\S+")


class TiktokenTokenizer(Vocabulary):
    """A `Tokenizer` over byte ranks and named special tokens; `where` they come from is said in errors."""

    def __init__(
        self,
        ranks: dict[bytes, int],
        specials: Mapping[str, int],
        where: str = "the tokenizer",
        *,
        bos: str | None = None,
        eos: str | None = None,
    ) -> None:
        chosen = SpecialTokens.choose(specials, where, bos, eos)
        super().__init__({rank: piece for piece, rank in ranks.items()}, chosen)
        self._encoding = tiktoken.Encoding(
            "llama3", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=chosen.ids
        )

    def _cut(self, text: str, after_special: bool) -> list[int]:
        if len(text) <= _MAX_RUN:
            return self._encoding.encode_ordinary(text)
        return [token for chunk in _chunks(text) for token in self._encoding.encode_ordinary(chunk)]


def _chunks(text: str) -> Iterator[str]:
    for start in range(0, len(text), _MAX_CHUNK):
        chunk = text[start : start + _MAX_CHUNK]
        long_runs = (run.span() for run in _RUNS.finditer(chunk) if run.end() - run.start() > _MAX_RUN)
        cuts = [cut for first, end in long_runs for cut in range(first + _MAX_RUN, end, _MAX_RUN)]
        for left, right in pairwise([0, *cuts, len(chunk)]):
            yield chunk[left:right]


def read_ranks(raw: bytes, path: Path) -> dict[bytes, int]:
    """The ranks of a `tokenizer.model` in tiktoken's form; ValueError where a line is wrong or a rank is missing."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise config_error(f"{path} line {number} is not a base64 token and its rank") from error
    if not complete(ranks):
        raise config_error(f"{path} does not hold ranks 0 to N-1 with every single byte among them")
    return ranks


def complete(ranks: Mapping[bytes, int]) -> bool:
    """Whether the ranks are 0 to N-1 with every single byte among them."""
    return sorted(ranks.values()) == list(range(len(ranks))) and all(bytes([byte]) in ranks for byte in range(256))

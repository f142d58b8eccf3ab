"""Documents -> rows of token ids that fit a model's context.

`TextPlan` says how: which documents (a part, without copies), in which order, cut into what. Several files are read
side by side, each giving the same number of tokens until it ends, so that the first tokens of a long list are a mixture
and not its first file; of more than `OPEN`, the next begins where one ends. A document's number is its place in that
reading, before anything is left out or shuffled: it depends on the files and the tokenizer alone, so that whoever reads
them sees the same split by document.

Nothing is held but a shuffle's buffer and, to find copies, 8 bytes a document.
"""

import random
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from heapq import heappop, heapreplace
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np

from llama_3.chat_format import ChatFormat
from llama_3.tokenizer import Tokenizer
from train.documents import Document, list_sources, read_documents
from train.errors import TrainError
from train.sentences import split_sentences

Unit = Literal["context", "packed", "sentence"]
Part = Literal["train", "held-out", "all"]
Item = TypeVar("Item")

CONTEXT, SENTENCE = 512, 192
"""Tokens of a row when nothing is said, for contexts and for sentences."""
SHUFFLED_DOCUMENTS, SHUFFLED_CHARACTERS = 4096, 1 << 24
"""What the buffer of a shuffle holds at most."""
OPEN = 64
"""Sources read side by side: each is an open file, and a decompressor's memory."""


@dataclass(frozen=True)
class TextPlan:
    """How documents become rows of tokens. Raises `TrainError` for a value that makes no sense."""

    unit: Unit = "context"
    """`context`: a document cut into contexts. `packed`: documents one after the other in contexts that are always full
    (what is left at the end is not given). `sentence`: one sentence, without the white space around it"""
    context: int = 0
    """the most tokens of a row, BOS included; 0 stands for 512, or 192 for sentences"""
    bos: bool = True
    """BOS in front of every row; in packed contexts also where a document begins"""
    long: Literal["cut", "drop"] = "cut"
    """a sentence over `context`: its beginning is kept, or nothing. Counted"""
    shuffle: int | None = None
    """seed of the order of documents, through a buffer of 4,096; None: as they are read"""
    dedupe: bool = False
    """leave out a document whose text was there before (white space and Unicode composition do not count)"""
    held_out: float = 0.0
    """share of the documents that is the held-out part"""
    part: Part = "all"
    split_seed: int = 0
    """which documents are held out"""
    language: str = "en"
    """code of the language whose rules end a sentence"""

    def __post_init__(self) -> None:
        if not self.context:
            object.__setattr__(self, "context", SENTENCE if self.unit == "sentence" else CONTEXT)
        for name, kinds in (("unit", get_args(Unit)), ("long", ("cut", "drop")), ("part", get_args(Part))):
            if (value := getattr(self, name)) not in kinds:
                raise TrainError(f"{name} is {value!r} in the plan of the text", f"it is one of {', '.join(kinds)}")
        if self.context < 1 + self.bos:
            raise TrainError(f"rows of {self.context} tokens hold no text", "a context takes 2 or more")
        if not 0 <= self.held_out < 1:
            raise TrainError(f"the held-out share is {self.held_out}", "it is at least 0 and less than 1")
        if self.part == "held-out" and not self.held_out:
            raise TrainError("the held-out part is empty: its share is 0", "hold out 0.05, say")
        if self.long == "drop" and self.unit != "sentence":
            raise TrainError(f"long documents are cut into rows of the unit {self.unit}", "only sentences are dropped")

    def holds(self, document: int) -> bool:
        """Whether the document of this number is in the plan's part."""
        held_out = is_held_out(document, self.held_out, self.split_seed)
        return self.part == "all" or held_out == (self.part == "held-out")


@dataclass(frozen=True)
class Row:
    """What the model reads at once: a context of one document, several short ones packed, or a sentence."""

    document: int
    """number of the document in the whole reading, from 0"""
    offset: int
    """position in the document of the first token after BOS; the tokens of a document are those of its sentences where
    it is read by sentences"""
    tokens: list[int]
    later: tuple[tuple[int, int], ...] = ()
    """packed: place in `tokens` and number of each document after the first"""

    def documents(self) -> list[int]:
        """The number of the document of each token."""
        numbers = [self.document] * len(self.tokens)
        for place, document in self.later:
            numbers[place:] = [document] * (len(numbers) - place)
        return numbers


@dataclass
class TextCounts:
    """What became of the text so far."""

    documents: int = 0
    """read, whatever became of them"""
    duplicates: int = 0
    """documents left out as copies of earlier ones"""
    elsewhere: int = 0
    """documents left out since they are in another part, or another process's"""
    rows: int = 0
    tokens: int = 0
    """of all rows, BOS included"""
    cut: int = 0
    """sentences of which only the beginning was given"""
    dropped: int = 0
    """sentences over the limit, and a last packed context that was not full: not given"""


@dataclass(frozen=True)
class _Numbered:
    number: int
    document: Document
    tokens: list[int] | None
    """None: not encoded yet"""


def default_chat(tokenizer: Tokenizer) -> ChatFormat | None:
    """How dialogs are written when nothing else is said: as in Llama 3; None for a vocabulary without its headers."""
    try:
        return ChatFormat(tokenizer)
    except ValueError:
        return None


def is_held_out(document: int, share: float, seed: int = 0) -> bool:
    """Whether a document is in the held-out part: a pure function, and a larger share holds what a smaller one does."""
    digest = blake2b(f"{seed}:{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


def read_rows(
    files: Sequence[Path | str],
    tokenizer: Tokenizer,
    chat: ChatFormat | None,
    plan: TextPlan | int,
    counts: TextCounts | None = None,
    *,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Row]:
    """The rows of all files, folders and `hf:` datasets, the same ones in every run; `counts` is kept up to date.

    A plan that is a number is that of contexts of so many tokens. Dialogs are written in the chat format, and are an
    error when `chat` is None; read by sentences, only the contents of their messages count. Of several processes, each
    gets the documents whose number modulo `world` is its `rank`. Raises `TrainError` for a source that is not usable;
    one that is empty gives no rows.
    """
    plan = TextPlan(context=plan) if isinstance(plan, int) else plan
    counts = TextCounts() if counts is None else counts
    documents = _chosen(_numbered(files, tokenizer, chat), plan, counts, rank, world)
    if plan.shuffle is not None:
        documents = shuffled(documents, plan.shuffle, lambda item: _characters(item.document))
    if plan.unit == "sentence":
        rows = _sentences(documents, tokenizer, plan, counts)
    else:
        cut = _pack if plan.unit == "packed" else _contexts
        rows = cut(((item.number, _tokens(item, tokenizer, chat)) for item in documents), tokenizer, plan, counts)
    for row in rows:
        counts.rows += 1
        counts.tokens += len(row.tokens)
        yield row


def interleave(sources: Iterable[Iterator[Item]], size: Callable[[Item], int]) -> Iterator[Item]:
    """Items drawn from several sources, always from the one that has given the least so far, as `size` measures it.

    `OPEN` of them are begun; one that comes in later counts as if it had given as much as the one that ended.
    """
    waiting = enumerate(sources)
    live = [(0, number, source) for number, source in islice(waiting, OPEN)]  # a heap; numbers differ
    while live:
        given, number, source = live[0]
        if (item := next(source, None)) is not None:
            heapreplace(live, (given + size(item), number, source))
            yield item
        elif (coming := next(waiting, None)) is not None:
            heapreplace(live, (given, *coming))
        else:
            heappop(live)


def shuffled(items: Iterable[Item], seed: int, size: Callable[[Item], int]) -> Iterator[Item]:
    """The items in an order drawn with `seed`, through a buffer of bounded number and size."""
    draw = random.Random(seed)
    buffer: list[Item] = []
    held = 0

    def take() -> Item:
        place = draw.randrange(len(buffer))
        buffer[place], buffer[-1] = buffer[-1], buffer[place]
        return buffer.pop()

    for item in items:
        buffer.append(item)
        held += size(item)
        while len(buffer) > SHUFFLED_DOCUMENTS or held > SHUFFLED_CHARACTERS:
            item = take()
            held -= size(item)
            yield item
    while buffer:
        yield take()


class Seen:
    """Which 64-bit numbers were there before, in 8 bytes each: a set of the latest, and sorted arrays of the others."""

    RECENT = 1 << 16

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted: list[np.ndarray[tuple[int], np.dtype[np.uint64]]] = []

    def add(self, number: int) -> bool:
        """Whether `number` is new; it is not the next time."""
        if number in self._recent or any(self._in(run, number) for run in self._sorted):
            return False
        self._recent.add(number)
        if len(self._recent) == self.RECENT:
            run = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._recent.clear()
            while self._sorted and len(self._sorted[-1]) <= len(run):  # so that there are few, each twice the next
                run = np.concatenate([self._sorted.pop(), run])
            run.sort()
            self._sorted.append(run)
        return True

    @staticmethod
    def _in(run: "np.ndarray[tuple[int], np.dtype[np.uint64]]", number: int) -> bool:
        place = int(np.searchsorted(run, np.uint64(number)))
        return place < len(run) and int(run[place]) == number


def _numbered(files: Sequence[Path | str], tokenizer: Tokenizer, chat: ChatFormat | None) -> Iterator[_Numbered]:
    """All documents with their numbers. One source alone is not encoded: its order does not hang on lengths."""
    sources = list_sources(files)
    readers = [_encoded(source, tokenizer, chat, lazy=len(sources) == 1) for source in sources]
    for number, item in enumerate(interleave(readers, lambda item: len(item.tokens or ()))):
        yield replace(item, number=number)


def _encoded(source: Path | str, tokenizer: Tokenizer, chat: ChatFormat | None, *, lazy: bool) -> Iterator[_Numbered]:
    for document in read_documents(source):
        if isinstance(document, list) and chat is None:
            raise TrainError(f"{source} holds dialogs, but this model has no chat format", "use running text")
        item = _Numbered(0, document, None)
        if lazy and not isinstance(document, list) and any(text.strip() for text in _texts(document)):
            yield item  # text that surely has tokens
        elif tokens := _tokens(item, tokenizer, chat):
            yield replace(item, tokens=tokens)


def _chosen(
    documents: Iterator[_Numbered], plan: TextPlan, counts: TextCounts, rank: int, world: int
) -> Iterator[_Numbered]:
    """The documents of the plan's part and of this process, copies left out. All are looked at for copies, so that
    which one counts as the first is the same in every part and process."""
    seen = Seen()
    for item in documents:
        counts.documents += 1
        if plan.dedupe and not seen.add(text_key(item.document)):
            counts.duplicates += 1
        elif item.number % world != rank or not plan.holds(item.number):
            counts.elsewhere += 1
        else:
            yield item


def text_key(document: Document) -> int:
    """64 bits of a hash of a document's text, the same however its white space and composed characters are written."""
    text = "".join(_texts(document)) if not isinstance(document, list) else "\0".join(
        part for message in document for part in (message.role, message.content)
    )  # fmt: skip
    normal = " ".join(unicodedata.normalize("NFC", text).split())
    return int.from_bytes(blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _texts(document: Document) -> Sequence[str]:
    """The running texts in a document."""
    if isinstance(document, str):
        return (document,)
    return document if isinstance(document, tuple) else [message.content for message in document]


def _characters(document: Document) -> int:
    return sum(map(len, _texts(document)))


def _tokens(item: _Numbered, tokenizer: Tokenizer, chat: ChatFormat | None) -> list[int]:
    """The tokens of a document without BOS."""
    if item.tokens is not None:
        return item.tokens
    if not isinstance(item.document, list):
        return tokenizer.encode("".join(_texts(item.document)), bos=False)
    assert chat is not None
    tokens = list(chat.encode_dialog(item.document)[0])
    return tokens[1:] if tokens[:1] == [tokenizer.bos_id] else tokens


def _contexts(
    documents: Iterable[tuple[int, list[int]]], tokenizer: Tokenizer, plan: TextPlan, counts: TextCounts
) -> Iterator[Row]:
    """Each document cut into rows of its own."""
    front = [tokenizer.bos_id] * plan.bos
    room = plan.context - len(front)
    for number, tokens in documents:
        for start in range(0, len(tokens), room):
            yield Row(number, start, [*front, *tokens[start : start + room]])


def _pack(
    documents: Iterable[tuple[int, list[int]]], tokenizer: Tokenizer, plan: TextPlan, counts: TextCounts
) -> Iterator[Row]:
    """Documents one after the other; where one place is left before a new one, BOS fills it."""
    front = [tokenizer.bos_id] * plan.bos
    first, offset, tokens, later = 0, 0, list[int](), list[tuple[int, int]]()
    for number, document in documents:
        start = 0
        while start < len(document):
            if not tokens:
                first, offset, later = number, start, []
            elif start == 0 and len(tokens) + len(front) < plan.context:
                later.append((len(tokens), number))
            if not tokens or start == 0:
                tokens += front
            taken = document[start : start + plan.context - len(tokens)]
            start += len(taken)
            tokens += taken
            if len(tokens) == plan.context:
                yield Row(first, offset, tokens, tuple(later))
                tokens = []
    counts.dropped += bool(tokens)


def _sentences(
    documents: Iterable[_Numbered], tokenizer: Tokenizer, plan: TextPlan, counts: TextCounts
) -> Iterator[Row]:
    """One row a sentence. Text that is split already is not split again."""
    front = [tokenizer.bos_id] * plan.bos
    room = plan.context - len(front)
    for item in documents:
        texts, offset = _texts(item.document), 0
        if not isinstance(item.document, tuple):
            texts = [sentence for text in texts for sentence in split_sentences(text, plan.language)]
        for text in texts:
            tokens = tokenizer.encode(text.strip(), bos=False)
            if len(tokens) > room and plan.long == "drop":
                counts.dropped += 1
            elif tokens:
                counts.cut += len(tokens) > room
                yield Row(item.number, offset, [*front, *tokens[:room]])
            offset += len(tokens)

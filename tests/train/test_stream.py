"""Streamed activations are those of a capture, served block by block as a pure function of the position."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import byte_tokenizer, tiny_model
from train.capture import Job, capture
from train.errors import TrainError
from train.reader import Source, open_source
from train.stream import StreamSource
from train.text import TextPlan

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    torch.set_num_threads(1)
    file = tmp_path / "t.txt"
    letters = random.Random(0)  # no document has a letter of another, and so none of its rows
    texts = ["".join(letters.choices((chr(40 + 3 * n), chr(41 + 3 * n)), k=14 * n)) for n in range(1, 14)]
    file.write_text("\n<|endoftext|>\n".join(texts))
    return Job(tiny_model(), byte_tokenizer(), [file], TextPlan(context=40), None, batch_tokens=100)


def stream(job: Job, seed: int = 3, **options: object) -> StreamSource:
    return StreamSource(job, HOOK, seed, mix_bytes=2 * 2 * 32 * 150, **options)  # type: ignore[arg-type]


def rows_of(x_ND: torch.Tensor) -> list[list[float]]:
    return sorted(x_ND.tolist())


def test_an_epoch_holds_the_rows_of_a_capture(job: Job, tmp_path: Path) -> None:
    summary = capture(
        job.model, job.tokenizer, job.files, tmp_path / "a", [HOOK], 10_000, plan=job.plan, batch_tokens=100
    )
    source: Source = stream(job)
    assert (source.d_in, source.hook) == (32, HOOK)
    blocks = summary.tokens // 150
    assert blocks > 5
    streamed_ND, stored_ND = source.batch(0, summary.tokens), open_source(tmp_path / "a", 0).batch(0, summary.tokens)
    stored = {tuple(row) for row in stored_ND.tolist()}
    assert all(tuple(row) in stored for row in streamed_ND.tolist())
    # Two epochs of blocks hold each row twice, but for the rows of the last block.
    twice_ND = source.batch(0, 150 * (2 * summary.tokens // 150))
    assert {tuple(row) for row in twice_ND.tolist()} == stored


@pytest.mark.parametrize("ahead", [False, True])
def test_a_batch_depends_on_its_position_alone(job: Job, ahead: bool) -> None:
    source = stream(job, ahead=ahead)
    whole_ND = source.batch(0, 2500)
    assert torch.equal(source.batch(700, 333), whole_ND[700:1033])  # back
    assert torch.equal(source.batch(1900, 64), whole_ND[1900:1964])  # on, blocks left out
    assert torch.equal(stream(job, ahead=ahead).batch(2111, 10), whole_ND[2111:2121])  # resumed
    assert not torch.equal(stream(job, seed=4).batch(0, 150), whole_ND[:150])
    assert rows_of(stream(job, seed=4).batch(0, 150)) == rows_of(whole_ND[:150])
    source.close()


def test_a_resume_passes_over_text_without_running_the_model(job: Job) -> None:
    expected_ND = stream(job).batch(1200, 150)
    ran: list[int] = []
    job.model.register_forward_pre_hook(lambda model, tokens: ran.append(1))
    assert torch.equal(stream(job).batch(1200, 150), expected_ND)
    assert 2 <= len(ran) <= 4  # of batches of some 90 rows


def test_held_out_documents_are_never_served(job: Job) -> None:
    split = replace(job, plan=TextPlan(context=40, held_out=0.4))
    source = stream(split)
    held_ND = source.held_out(10_000)
    assert held_ND is not None and len(held_ND) > 50
    served = {tuple(row) for row in source.batch(0, 3000).tolist()}
    assert not served & {tuple(row) for row in held_ND.tolist()}
    first_ND = source.held_out(20)
    assert first_ND is not None and torch.equal(first_ND, held_ND[:20])
    assert stream(job).held_out(10) is None
    assert stream(job).digest != source.digest
    with pytest.raises(TrainError, match="leaves nothing to train on"):
        stream(replace(job, plan=replace(split.plan, part="held-out")))


def test_a_shuffled_plan_has_another_order_in_each_epoch(job: Job, tmp_path: Path) -> None:
    (tmp_path / "e.txt").write_text("\n<|endoftext|>\n".join(chr(48 + n) * 30 for n in range(40)))

    def repeats(seed: int | None) -> bool:
        plan = TextPlan(context=40, shuffle=seed)
        source = StreamSource(replace(job, files=[tmp_path / "e.txt"], plan=plan), HOOK, 0, mix_bytes=2 * 2 * 32 * 100)
        return rows_of(source.batch(0, 100)) == rows_of(source.batch(1200, 100))

    assert repeats(None) and not repeats(5)


def test_a_text_without_tokens_is_one_sentence(job: Job, tmp_path: Path) -> None:
    (tmp_path / "e.txt").write_text("x")
    empty = replace(job, files=[tmp_path / "e.txt"], plan=TextPlan(context=40, bos=False))
    with pytest.raises(TrainError, match=r"e\.txt holds no token"):
        stream(empty).batch(0, 1)
    with pytest.raises(TrainError, match=r"no blocks\.9"):
        StreamSource(job, "blocks.9.hook_resid_post", 0)

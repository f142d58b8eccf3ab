"""Latents that tell two sets of texts apart: scores, effect, interval, and what is left to chance."""

import json
import math
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

from llama_3.chat_format import ChatFormat
from llama_3.checkpoint import load_model
from llama_3.tokenizer import load_tokenizer
from sae.checkpoint import load_sae
from steer.analysis.contrast import By, contrast, discoveries, fewest, interval, p_values, read_side, superiority
from steer.cli import main
from steer.config import DEMO_MODEL, DEMO_SAE
from steer.engine import Engine
from steer.errors import SteerError
from train.errors import TrainError

DOGS = [
    "Tom has a dog. The dog likes to run.",
    "A big dog ran home with a bone in his mouth.",
    "The dog and the cat were friends.",
    "My dog barks at the moon every night.",
    "She washed the dog and gave him food.",
    "Once there was a brown dog named Max.",
]
FISH = [
    "Tom has a fish. The fish likes to swim.",
    "A big fish swam under the bridge.",
    "The fish and the frog were friends.",
    "My fish hides behind a stone every night.",
    "She fed the fish and cleaned his bowl.",
    "Once there was a golden fish named Max.",
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.set_num_threads(1)
    return Engine(load_model(DEMO_MODEL, "float32"), load_tokenizer(DEMO_MODEL), load_sae(DEMO_SAE))


def sides(engine: Engine, *lists: list[str]) -> list[list[tuple[list[int], ...]]]:
    return [[read_side(text, engine.tokenizer, None, 512, 1)[0][0] for text in texts] for texts in lists]


@pytest.mark.parametrize("by", ["max", "mean", "last"])
def test_scores_are_those_of_the_tokens_one_by_one(engine: Engine, by: By) -> None:
    assert engine.sae is not None
    found = contrast(engine.model, engine.sae, engine.tokenizer, *sides(engine, DOGS[:3], FISH[:1]), by=by)
    expected: dict[int, list[float]] = {}
    for number, text in enumerate(DOGS[:3]):
        tokens = engine.inspect(text)[1:]
        for hit in (hit for token in (tokens[-1:] if by == "last" else tokens) for hit in token.hits):
            scores = expected.setdefault(hit.latent, [0.0] * 3)
            more = hit.activation / len(tokens)
            scores[number] = scores[number] + more if by == "mean" else max(scores[number], hit.activation)
    got = {each.latent: each for each in found.differences}
    assert found.texts_a == 3 and found.texts_b == 1 and set(expected) <= set(got)
    for latent, scores in expected.items():
        assert got[latent].mean_a == pytest.approx(sum(scores) / 3, rel=1e-4)
        assert got[latent].share_a == pytest.approx(sum(score > 0 for score in scores) / 3)
    assert all(each.mean_a == 0 for latent, each in got.items() if latent not in expected)


def test_what_tells_dogs_from_fish_comes_first(engine: Engine) -> None:
    assert engine.sae is not None
    found = contrast(engine.model, engine.sae, engine.tokenizer, *sides(engine, DOGS, FISH))
    first = {each.latent: each for each in found.differences[:4]}
    assert first[828].effect == 1 and first[2005].effect == -1  # the demo's latents of dogs and of fish
    assert first[828].share_a == 1 and first[828].share_b == 0 and 0 < first[828].low < 1 == first[828].high
    nearer = [each.low if each.effect >= 0 else -each.high for each in found.differences]
    assert all(a >= b - 1e-6 for a, b in pairwise(nearer))
    turned = contrast(engine.model, engine.sae, engine.tokenizer, *sides(engine, FISH, DOGS))
    other = {each.latent: each for each in turned.differences}
    for each in found.differences:
        assert other[each.latent].effect == pytest.approx(-each.effect)
        assert other[each.latent].low == pytest.approx(-each.high)


def test_a_long_text_counts_once(engine: Engine) -> None:
    assert engine.sae is not None
    long = " ".join(DOGS)
    [cut], _ = read_side(long, engine.tokenizer, None, 16, 1)
    assert len(cut) > 3 and all(row[0] == engine.tokenizer.bos_id and len(row) <= 16 for row in cut)
    assert [token for row in cut for token in row[1:]] == engine.tokenizer.encode(long)
    found = contrast(engine.model, engine.sae, engine.tokenizer, [cut], [cut[:1]])
    assert (found.texts_a, found.texts_b) == (1, 1) and not any(each.certain for each in found.differences)
    assert all(each.mean_a >= each.mean_b for each in found.differences), "the whole scores at least as its beginning"


def test_superiority_is_that_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    a_FA, b_FB = (torch.randint(0, 4, (20, size), generator=generator).float() for size in (5, 7))
    for latent, theta in enumerate(superiority(a_FA, b_FB).tolist()):
        pairs = product(a_FA[latent].tolist(), b_FB[latent].tolist())
        assert theta == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / 35)


def test_the_ends_of_an_interval_lie_z_errors_away() -> None:
    theta_F = torch.tensor([0.5, 0.7, 0.95, 1.0, 0.0], dtype=torch.float64)
    for a, b in ((3, 3), (20, 5), (200, 300)):
        low_F, high_F = interval(theta_F, a, b)
        assert low_F[4] == 0 and high_F[3] == 1 and bool((low_F <= theta_F).all() and (high_F >= theta_F).all())
        for theta, end in [*zip(theta_F.tolist()[:4], low_F.tolist(), strict=False), (0.0, float(high_F[4]))]:
            spread = (a + b) / 2 - 1
            variance = end * (1 - end) * (1 + spread * (1 - end) / (2 - end) + spread * end / (1 + end)) / (a * b)
            assert abs(theta - end) == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-4)
    assert float(interval(theta_F, 3, 3)[0][3]) < 0.51, "three texts on each side prove nothing"


def test_intervals_hold_what_they_promise_and_chance_stays_below_its_level() -> None:
    generator = torch.Generator().manual_seed(0)
    for shift in (0.0, 1.0):
        true = 0.5 * (1 + math.erf(shift / 2))
        a_FA, b_FB = (torch.randn(4000, size, generator=generator) for size in (12, 20))
        theta_F = superiority(a_FA + shift, b_FB)
        low_F, high_F = interval(theta_F, 12, 20)
        held = float(((low_F <= true) & (true <= high_F)).double().mean())
        assert 0.935 < held < 0.975
        p_F = p_values(theta_F, a_FA + shift, b_FB)
        assert int(discoveries(p_F).sum()) <= 2 if shift == 0 else int(discoveries(p_F).sum()) > 2000
        if shift == 0:
            assert float((p_F < 0.05).double().mean()) == pytest.approx(0.045, abs=0.015)


def test_few_texts_and_ties_prove_nothing() -> None:
    a_FA, b_FB = torch.tensor([[1.0, 2, 3], [1, 1, 1]]), torch.tensor([[0.0, 0, 0], [1, 1, 1]])
    p_F = p_values(superiority(a_FA, b_FB), a_FA, b_FB)
    assert p_F.tolist() == [pytest.approx(0.1), 1.0] and fewest(3, 3) == pytest.approx(0.1) and fewest(1, 1) == 1
    assert not bool(discoveries(p_F).any()) and discoveries(p_F[:0]).tolist() == []
    assert discoveries(torch.tensor([0.2, 0.01, 0.9, 0.02]).double()).tolist() == [False, True, False, True]


def test_a_side_is_a_file_or_the_words_themselves(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = engine.tokenizer
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(DOGS))
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "A dog?"}]}))
    texts, more = read_side("a.txt", tokenizer, None, 64, 6)
    assert len(texts) == 6 and not more and texts[0] == ([tokenizer.bos_id, *tokenizer.encode(DOGS[0])],)
    assert [len(part) for part in read_side("a.txt", tokenizer, None, 64, 4)[:1]] == [4]
    assert (
        read_side("a.txt", tokenizer, None, 64, 4)[1]
        and len(read_side("./", tokenizer, ChatFormat(tokenizer), 64, 9)[0]) == 7
    )
    assert read_side("a dog", tokenizer, None, 64, 1) == ([([tokenizer.bos_id, *tokenizer.encode("a dog")],)], False)
    assert len(read_side("long " * 2000, tokenizer, None, 512, 1)[0][0]) > 1
    with pytest.raises(TrainError, match=r"there is no text file gone\.txt"):
        read_side("gone.txt", tokenizer, None, 64, 1)
    with pytest.raises(SteerError, match="empty"):
        read_side(" ", tokenizer, None, 64, 1)


def test_what_cannot_be_compared_is_refused(engine: Engine) -> None:
    assert engine.sae is not None
    one = sides(engine, DOGS[:1])[0]
    with pytest.raises(SteerError, match="B holds no text"):
        contrast(engine.model, engine.sae, engine.tokenizer, one, [([engine.tokenizer.bos_id],)])
    with pytest.raises(SteerError, match="scored by `sum`"):
        contrast(engine.model, engine.sae, engine.tokenizer, one, one, by="sum")  # type: ignore[arg-type]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    for name, texts in (("a.txt", DOGS), ("b.txt", FISH)):
        (tmp_path / name).write_text("\n<|endoftext|>\n".join(texts))
    assert main(["features", "contrast", "a.txt", "b.txt", "--limit", "5", "--json"]) == 0
    out, err = capsys.readouterr()
    entries = [json.loads(line) for line in out.splitlines()]
    assert len(entries) == 5 and {"latent", "effect", "low", "high", "p", "certain", "label"} <= set(entries[0])
    assert {828: "dog", 2005: "fish"}.items() <= {
        each["latent"]: each["label"].split()[0].strip(",") for each in entries
    }.items()
    assert "texts: 6 of A, 6 of B; " in err
    assert main(["features", "contrast", "a.txt", "The fish swam.", "--limit", "3", "--max-texts", "2"]) == 0
    out, err = capsys.readouterr()
    heading, *rows = out.splitlines()
    label = heading.index("label")
    assert len(rows) == 3 and label < 60 and all(row[label - 2 : label] == "  " and row[label] != " " for row in rows)
    assert "of `a.txt` the first 2 texts are read" in err and "so few texts" in err
    assert "a line `<|endoftext|>` stands between two texts" in err
    assert main(["features", "contrast", "a.txt", "a.txt"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) <= 1 and "nothing tells A from B: no effect differs from 0" in err
    assert main(["features", "contrast", "a.txt", "b.txt", "--limit", "0"]) == 1
    assert "--limit is 0" in capsys.readouterr().err

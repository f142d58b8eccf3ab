"""Activation patching against hooks written by hand on transformers' modules, and latents against a loop."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_3.hooks import SITES, HookPoint, Hooks
from llama_3.model import Transformer
from sae.model import SAE
from steer.analysis.patching import patch
from steer.errors import SteerError
from tests.llama_3 import test_hook_sites as sites
from tests.llama_3.test_model import oracle
from tests.steer.test_sae_kinds import sae_of
from tests.tiny import byte_tokenizer, tiny_config, tiny_model

torch.set_num_threads(1)
TOKENIZER = byte_tokenizer()
CLEAN, CORRUPT = (TOKENIZER.encode(text, bos=True) for text in ("the sea is", "the zoo is"))
ANSWER, WRONG = 65, 70


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Any]:
    return oracle(Path(tmp_path_factory.mktemp("patch")), tiny_config(n_layers=3, tied=False))


def run(theirs: Any, tokens: list[int], site: str, change: sites.Change) -> float:
    """The difference of the two logits at the end, with transformers' module of layer 1 hooked."""
    handles = sites.attach(theirs, site, change)
    try:
        with torch.no_grad():
            logits_V = theirs(torch.tensor([tokens])).logits[0, -1]
        return float(logits_V[ANSWER] - logits_V[WRONG])
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("site", SITES)
def test_every_cell_is_that_of_hooks_on_transformers(models: tuple[Transformer, Any], site: str) -> None:
    model, theirs = models
    point = HookPoint(sites.LAYER, site)
    found = patch(model, TOKENIZER, CLEAN, CORRUPT, [point], range(len(CLEAN)), answer=ANSWER, wrong=WRONG)
    kept: list[Tensor] = []
    clean, corrupt = (
        run(theirs, tokens, site, lambda x_BTD: kept.append(x_BTD.clone()) or x_BTD) for tokens in (CLEAN, CORRUPT)
    )
    # What transformers' norm reads at resid_mid is also what the block goes on with: there it is added to attention's.
    put_in = "attn_out" if site == "resid_mid" else site
    assert (found.clean, found.corrupt) == (pytest.approx(clean, abs=1e-4), pytest.approx(corrupt, abs=1e-4))
    assert [cell.index for cell in found.cells] == list(range(len(CLEAN)))
    for cell in found.cells:

        def change(x_BTD: Tensor, place: int = cell.index) -> Tensor:
            patched_BTD = x_BTD.clone()
            patched_BTD[:, place] += kept[0][:, place] - kept[1][:, place]
            return patched_BTD

        wanted = run(theirs, CORRUPT, put_in, change)
        assert cell.hook == str(point) and cell.difference == pytest.approx(wanted, abs=1e-4)
        assert cell.recovered == pytest.approx((wanted - corrupt) / (clean - corrupt), abs=1e-3)
    assert any(abs(cell.recovered or 0.0) > 0.01 for cell in found.cells)


def test_the_last_position_of_the_last_layer_is_the_whole_answer(models: tuple[Transformer, Any]) -> None:
    points = [HookPoint(layer, "resid_post") for layer in range(3)]
    found = patch(models[0], TOKENIZER, CLEAN, CORRUPT, points)
    assert [cell.index for cell in found.cells[:2]] == [5, 6], "what stands before is the same"
    assert found.cells[-1].recovered == pytest.approx(1.0, abs=1e-4)
    ends = [models[0](torch.tensor([tokens]))[0, -1] for tokens in (CLEAN, CORRUPT)]
    assert (found.answer.token, found.wrong.token) == tuple(int(logits_V.argmax()) for logits_V in ends)
    assert found.clean == pytest.approx(float(ends[0][found.answer.token] - ends[0][found.wrong.token]), abs=1e-4)
    assert found.answer.logprob == pytest.approx(float(ends[0].log_softmax(-1).max()), abs=1e-4)
    assert found.tokens[5] == ("s", "z") and found.tokens[1] == ("t", "t")


@pytest.mark.parametrize(("kind", "normalise"), [("topk", "none"), ("jumprelu", "layer_norm")])
def test_only_what_some_latents_contribute(models: tuple[Transformer, Any], kind: str, normalise: str) -> None:
    model, sae, point = models[0], sae_of(kind, normalise), HookPoint(0, "resid_post")
    xs = [model(torch.tensor([tokens]), stop_after=point)[0] for tokens in (CLEAN, CORRUPT)]
    latents = [int(latent) for latent in sae.encode(xs[0][6]).indices[:3]]
    found = patch(model, TOKENIZER, CLEAN, CORRUPT, [point], [0, 6], answer=65, wrong=70, sae=sae, latents=latents)

    def contribution(x_D: Tensor) -> Tensor:
        pairs = zip(*(each.tolist() for each in sae.encode(x_D)), strict=True)
        scaled = (sae.scale(x_D) * value * sae.decoder_direction(one) for one, value in pairs if one in latents)
        return sum(scaled, torch.zeros_like(x_D))

    hooks = Hooks()

    def change(x_BTD: Tensor, _: Any) -> Tensor:
        patched_BTD = x_BTD.clone()
        patched_BTD[0, 6] += contribution(xs[0][6]) - contribution(xs[1][6])
        return patched_BTD

    hooks.add(point, change)
    logits_V = model(torch.tensor([CORRUPT]), hooks=hooks)[0, -1]
    assert found.cells[0].difference == pytest.approx(found.corrupt, abs=1e-4), "the first token is not read"
    assert found.cells[1].difference == pytest.approx(float(logits_V[65] - logits_V[70]), abs=1e-4)
    assert abs(found.cells[1].difference - found.corrupt) > 1e-3


@pytest.mark.parametrize(
    ("clean", "corrupt", "options", "why"),
    [
        (CLEAN, CORRUPT[:-1], {}, "the clean prompt has 11 tokens and the corrupt one 10"),
        (CLEAN, CLEAN, {}, "the same"),
        (CLEAN, CORRUPT, {"positions": [3, 11]}, "no token 11"),
        (CLEAN, CORRUPT, {"answer": 65, "wrong": 65}, "the answer and the wrong one are both 'A'"),
        (CLEAN, CORRUPT, {"points": [HookPoint(2, "resid_post")]}, "the model has 2 blocks"),
    ],
)
def test_what_cannot_be_patched_is_one_sentence(
    clean: list[int], corrupt: list[int], options: dict[str, Any], why: str
) -> None:
    points = options.pop("points", [HookPoint(0, "resid_post")])
    with pytest.raises(SteerError, match=why):
        patch(tiny_model(), TOKENIZER, clean, corrupt, points, **options)


def test_an_sae_is_read_in_either_run(models: tuple[Transformer, Any]) -> None:
    silent: SAE = sae_of("jumprelu")
    silent.weights["threshold"].fill_(1e6)
    found = patch(
        models[0], TOKENIZER, CLEAN, CORRUPT, [HookPoint(0, "resid_post")], answer=65, wrong=70, sae=silent, latents=[1]
    )
    assert {round(cell.recovered or 0.0, 4) for cell in found.cells} == {0.0}


def test_a_range_beyond_the_prompts_is_refused_and_not_written_out(models: tuple[Transformer, Any]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(SteerError, match=f"there is no token {len(CLEAN)} in these prompts"):
            patch(models[0], TOKENIZER, CLEAN, CORRUPT, [HookPoint(0, "resid_post")], range(300_000))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()

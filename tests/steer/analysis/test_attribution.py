"""Attributions against hooks and autograd written out by hand on transformers, and against edits by the steerer."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_3.hooks import HookPoint, Hooks
from llama_3.model import Transformer
from sae.compiled import CompiledEdit, CompiledSet
from sae.intervene import Steerer
from sae.model import SAE
from steer.analysis.attribution import STAND_INS, ablate, why_latent, why_token
from steer.errors import SteerError
from tests.llama_3.test_model import oracle
from tests.sae.reference import KINDS
from tests.steer.test_sae_kinds import sae_of
from tests.tiny import byte_tokenizer, tiny_config

torch.set_num_threads(1)
HOOK = HookPoint(0, "resid_post")
TOKENIZER = byte_tokenizer()
TOKENS = TOKENIZER.encode("Once upon", bos=True)
NEXT = TOKENS[-1]
SAE_KINDS = [*[(kind, "none") for kind in KINDS], ("topk", "layer_norm"), ("jumprelu", "unit_norm")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Any]:
    return oracle(Path(tmp_path_factory.mktemp("why")), tiny_config(n_layers=3))


def by_hand(theirs: Any, tokens: list[int], change: Any) -> Tensor:
    """Log-probabilities (V,) after the tokens, transformers' first layer's output changed by a hook."""

    def after(module: Any, args: Any, output: Any) -> Any:
        x_BTD = output[0] if isinstance(output, tuple) else output
        changed = torch.stack([change(x_BTD[0])])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = theirs.model.layers[0].register_forward_hook(after)
    try:
        logits: Tensor = theirs(torch.tensor([tokens])).logits[0, -1]
        return logits.log_softmax(-1)
    finally:
        handle.remove()


def contributions(sae: SAE, x_TD: Tensor) -> dict[int, Tensor]:
    """What each active latent contributes, (T, D), position by position in a loop; the first is not read."""
    found: dict[int, Tensor] = {}
    for place in range(1, len(x_TD)):
        latents = sae.encode(x_TD[place])
        for latent, value in zip(latents.indices.tolist(), latents.values.tolist(), strict=True):
            if value > 0:
                part_TD = found.setdefault(latent, torch.zeros_like(x_TD))
                part_TD[place] += value * sae.scale(x_TD[place]) * sae.decoder_direction(latent)
    return found


@pytest.mark.parametrize(("kind", "normalise"), SAE_KINDS)
def test_effects_are_those_of_hooks_on_transformers(models: tuple[Transformer, Any], kind: str, normalise: str) -> None:
    model, theirs = models
    sae, before = sae_of(kind, normalise), TOKENS[:-1]
    found = why_token(model, TOKENIZER, sae, HOOK, TOKENS, len(before), check=6)
    seen: list[Tensor] = []
    plain_V = by_hand(theirs, before, lambda x_TD: seen.append(x_TD.detach()) or x_TD).detach()
    x_TD = seen[0]
    parts = contributions(sae, x_TD)
    assert {effect.latent for effect in found.latents} == set(parts)
    assert found.target.token == NEXT and found.target.logprob == pytest.approx(float(plain_V[NEXT]), abs=1e-4)

    def gradient(at_TD: Tensor) -> Tensor:
        leaf_TD = at_TD.clone().requires_grad_()
        by_hand(theirs, before, lambda _: leaf_TD)[NEXT].backward()
        assert leaf_TD.grad is not None
        return leaf_TD.grad

    slope_TD = gradient(x_TD)
    for effect in found.latents:
        assert effect.gradient == pytest.approx(float((parts[effect.latent] * slope_TD).sum()), rel=1e-3, abs=1e-5)
        assert effect.attribution == pytest.approx(sum(place.attribution for place in effect.places), abs=1e-6)
    strengths = [abs(effect.attribution) for effect in found.latents]
    assert strengths == sorted(strengths, reverse=True)
    assert [effect.removed is not None for effect in found.latents] == [n < 6 for n in range(len(strengths))]
    with torch.no_grad():
        for effect in found.latents[:6]:
            without_V = by_hand(theirs, before, lambda x_TD, part=parts[effect.latent]: x_TD - part)
            assert effect.removed == pytest.approx(float(plain_V[NEXT] - without_V[NEXT]), rel=1e-3, abs=1e-5)
        explained_TD = sum(parts.values())
        bias_TD = x_TD - x_TD
        bias_TD[1:] = sae.b_dec_D * sae.scale(x_TD[1:])
        if normalise != "none":
            bias_TD[1:] += x_TD[1:].mean(-1, keepdim=True)
        error_TD = x_TD - explained_TD - bias_TD
        error_TD[0] = 0
        dropped, bare = (
            float(plain_V[NEXT] - by_hand(theirs, before, lambda x_TD, gone=gone: x_TD - gone)[NEXT])
            for gone in (error_TD, error_TD + explained_TD)
        )
    assert found.error_removed == pytest.approx(dropped, rel=1e-3, abs=1e-5)
    assert found.together == pytest.approx(bare, rel=1e-3, abs=1e-5)
    assert found.error == pytest.approx(float((error_TD * gradient(x_TD - error_TD / 2)).sum()), rel=1e-3, abs=1e-5)
    assert found.total == pytest.approx(sum(effect.attribution for effect in found.latents) + found.error)


@pytest.mark.parametrize(("kind", "index", "groups"), [("topk", 2, 16), ("relu", 8, 16), ("relu", 8, 5)])
def test_the_strongest_are_dealt_into_groups_that_go_halfway(
    models: tuple[Transformer, Any], kind: str, index: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer.analysis.effects._GROUP_TOKENS", groups * index)
    model, theirs = models
    before = TOKENS[:index]
    found = why_token(model, TOKENIZER, sae_of(kind), HOOK, TOKENS, index)
    seen: list[Tensor] = []
    by_hand(theirs, before, lambda x_TD: seen.append(x_TD.detach()) or x_TD)
    parts = contributions(sae_of(kind), seen[0])
    assert len(found.latents) == len(parts) and (len(parts) == 8 if kind == "topk" else len(parts) > 40)
    by_gradient = sorted(found.latents, key=lambda effect: -abs(effect.gradient))
    assert all(effect.attribution == effect.gradient for effect in by_gradient[4 * groups :])
    for start in range(min(groups, len(parts))):
        group = by_gradient[: 4 * groups][start::groups]
        halfway_TD = seen[0] - sum(parts[effect.latent] for effect in group) / 2
        leaf_TD = halfway_TD.requires_grad_()
        by_hand(theirs, before, lambda _, leaf_TD=leaf_TD: leaf_TD)[TOKENS[index]].backward()
        assert leaf_TD.grad is not None
        for effect in group:
            wanted = float((parts[effect.latent] * leaf_TD.grad).sum())
            assert effect.attribution == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_against_another_token_the_logits_are_compared(models: tuple[Transformer, Any]) -> None:
    model, theirs = models
    found = why_token(model, TOKENIZER, sae_of("topk"), HOOK, TOKENS, against=65)
    assert found.against is not None and found.index == len(TOKENS)
    logits_V = theirs(torch.tensor([TOKENS])).logits[0, -1]
    assert found.target.token == int(logits_V.argmax()) == found.likeliest[0].token
    apart = found.target.logprob - found.against.logprob
    assert apart == pytest.approx(float((logits_V.max() - logits_V[65]).detach()), abs=1e-4)
    effect = found.latents[0]
    steerer = Steerer(sae_of("topk"), sets={0: CompiledSet((CompiledEdit("ablate", effect.latent),))})
    hooks = Hooks()
    hooks.add(HOOK, steerer)
    ablated_V = model(torch.tensor([TOKENS]), hooks=hooks)[0, -1]
    assert effect.removed == pytest.approx(apart - float(ablated_V[found.target.token] - ablated_V[65]), abs=1e-4)
    other = why_token(model, TOKENIZER, sae_of("topk"), HOOK, TOKENS, target=66)
    assert other.target.token == 66


def test_the_normalised_figure_is_the_formula_that_the_documents_give(models: tuple[Transformer, Any]) -> None:
    sae = sae_of("topk")
    assert sae.stats is not None
    generator = torch.Generator().manual_seed(5)
    most_F = torch.rand(64, generator=generator) + 0.5
    density_F = torch.rand(64, generator=generator).clamp(0.01)
    sae.stats = replace(sae.stats, max_F=most_F, density_F=density_F)
    found = why_token(models[0], TOKENIZER, sae, HOOK, TOKENS, by="normalised", check=3)
    usual_max, usual_rarity = float(most_F.median()), float((-density_F.log()).median())
    for effect in found.latents:
        rarity = -math.log(density_F[effect.latent]) / usual_rarity
        wanted = effect.attribution * usual_max / float(most_F[effect.latent]) * rarity
        assert effect.normalised == pytest.approx(wanted, rel=1e-4)
    order = [abs(effect.normalised or 0.0) for effect in found.latents]
    assert order == sorted(order, reverse=True)
    assert [effect.removed is not None for effect in found.latents[:4]] == [True, True, True, False]
    sae.stats = None
    plain = why_token(models[0], TOKENIZER, sae, HOOK, TOKENS)
    assert {effect.normalised for effect in plain.latents} == {None}
    with pytest.raises(SteerError, match="no statistics"):
        why_token(models[0], TOKENIZER, sae, HOOK, TOKENS, by="normalised")


def test_special_tokens_and_the_first_are_not_read(models: tuple[Transformer, Any]) -> None:
    tokens = [256, 65, 264, 66, 67]
    found = why_token(models[0], TOKENIZER, sae_of("relu"), HOOK, tokens)
    assert {place.index for effect in found.latents for place in effect.places} == {1, 3, 4}


@pytest.mark.parametrize(
    ("index", "why"), [(0, "nothing comes before"), (1, "no latent is on"), (99, "no token 99"), (-1, "no token -1")]
)
def test_an_index_that_cannot_be_explained_is_one_sentence(
    models: tuple[Transformer, Any], index: int, why: str
) -> None:
    with pytest.raises(SteerError, match=why):
        why_token(models[0], TOKENIZER, sae_of("topk"), HOOK, TOKENS, index)
    if index == 99:
        with pytest.raises(SteerError, match="itself"):
            why_token(models[0], TOKENIZER, sae_of("topk"), HOOK, TOKENS, 3, against=TOKENS[3])


def reading(model: Transformer, sae: SAE, tokens: list[int], latent: int) -> float:
    """What the encoder reads of a latent at the last token, before its activation function, in units of activation."""
    x_D = model(torch.tensor([tokens]), stop_after=HOOK)[0, -1]
    slope = float(sae.r_mag_F[latent].exp()) if sae.config.activation == "gated" else 1.0
    return float(sae.pre_activations(x_D)[latent]) * slope


@pytest.mark.parametrize("kind", ["topk", "gated"])
def test_a_token_counts_by_what_the_latent_reads_with_others_in_its_place(
    models: tuple[Transformer, Any], kind: str
) -> None:
    model, sae = models[0], sae_of(kind)
    latent = int(sae.encode(model(torch.tensor([TOKENS]), stop_after=HOOK)[0, 7]).indices[0])
    found = why_latent(model, TOKENIZER, sae, HOOK, TOKENS, latent, 7, check=3)
    assert (found.index, len(found.tokens), found.latents, found.together) == (7, 7, (), None)
    assert found.activation > 0
    before = TOKENS[:8]
    base = reading(model, sae, before, latent)
    instead = TOKENIZER.encode(STAND_INS)
    for number, effect in enumerate(found.tokens):
        others = [token for token in instead if token != effect.token]
        lost = [
            base - reading(model, sae, [*before[: effect.index], token, *before[effect.index + 1 :]], latent)
            for token in others
        ]
        assert effect.attribution == pytest.approx(lost[0], rel=1e-3, abs=1e-5)
        if number < 3:
            assert effect.removed == pytest.approx(sum(lost) / len(lost), rel=1e-3, abs=1e-5)
        else:
            assert effect.removed is None
    near = why_latent(model, TOKENIZER, sae, HOOK, TOKENS, latent, 7, window=2)
    assert {effect.index for effect in near.tokens} == {6, 7}
    strongest = why_latent(model, TOKENIZER, sae, HOOK, TOKENS, latent)
    assert strongest.activation >= found.activation


@pytest.mark.parametrize("site", ["resid_pre", "attn_out"])
def test_a_latent_is_explained_by_those_of_an_sae_below(models: tuple[Transformer, Any], site: str) -> None:
    model, sae, below = models[0], sae_of("topk"), sae_of("jumprelu")
    point = HookPoint(0, site)
    latent = int(sae.encode(model(torch.tensor([TOKENS]), stop_after=HOOK)[0, 7]).indices[0])
    found = why_latent(model, TOKENIZER, sae, HOOK, TOKENS, latent, 7, through=(below, point), check=4)
    before = torch.tensor([TOKENS[:8]])
    parts = contributions(below, model(before, stop_after=point)[0])
    assert {effect.latent for effect in found.latents} == set(parts) and found.tokens == ()

    def read(gone_TD: Tensor) -> Tensor:
        hooks = Hooks()
        hooks.add(point, lambda x_BTD, _: x_BTD - gone_TD)
        at_BTD = model(before, hooks=hooks, stop_after=HOOK)
        value: Tensor = sae.pre_activations(at_BTD[0, -1])[latent]
        return value

    gone_TD = torch.zeros(8, 32, requires_grad=True)
    base = read(gone_TD)
    base.backward()
    base = base.detach()
    assert gone_TD.grad is not None
    for effect in found.latents:
        part_TD = parts[effect.latent]
        assert effect.gradient == pytest.approx(-float((part_TD * gone_TD.grad).sum()), rel=1e-3, abs=1e-5)
    for effect in found.latents[:4]:
        assert effect.removed == pytest.approx(float(base - read(parts[effect.latent])), rel=1e-3, abs=1e-5)
    with pytest.raises(SteerError, match="does not stand below"):
        why_latent(model, TOKENIZER, sae, HOOK, TOKENS, latent, 7, through=(below, HOOK))


def test_a_latent_that_is_off_says_where_it_is_on(models: tuple[Transformer, Any]) -> None:
    sae = sae_of("topk")
    x_TD = models[0](torch.tensor([TOKENS]), stop_after=HOOK)[0]
    on = {place: set(sae.encode(x_TD[place]).indices.tolist()) for place in range(1, len(TOKENS))}
    latent, place = next((one, place) for place in on for other in on for one in on[other] - on[place])
    with pytest.raises(SteerError, match=f"latent {latent} is not on at token {place}") as caught:
        why_latent(models[0], TOKENIZER, sae, HOOK, TOKENS, latent, place)
    wanted = [str(place) for place in on if latent in on[place]]
    assert caught.value.hint == f"it is on at {', '.join(wanted)}"
    never = next(latent for latent in range(64) if not any(latent in some for some in on.values()))
    with pytest.raises(SteerError, match="nowhere"):
        why_latent(models[0], TOKENIZER, sae, HOOK, TOKENS, never)
    for call in (why_latent, ablate):
        with pytest.raises(SteerError, match="there is no latent 64"):
            call(models[0], TOKENIZER, sae, HOOK, TOKENS, 64)


@pytest.mark.parametrize(("kind", "normalise"), SAE_KINDS)
def test_ablating_is_the_edit_of_that_name(models: tuple[Transformer, Any], kind: str, normalise: str) -> None:
    model, sae = models[0], sae_of(kind, normalise)
    ids = torch.tensor([TOKENS])
    latents = sae.encode(model(ids, stop_after=HOOK)[0, 3])
    latent = int(latents.indices[0])
    hooks = Hooks()
    hooks.add(HOOK, Steerer(sae, TOKENIZER.special_ids, sets={0: CompiledSet((CompiledEdit("ablate", latent),))}))
    plain_TV, ablated_TV = (model(ids, hooks=one)[0].log_softmax(-1) for one in (None, hooks))
    found = ablate(model, TOKENIZER, sae, HOOK, TOKENS, latent)
    assert [change.index for change in found] == list(range(len(TOKENS)))
    assert found[0].logprob is None and found[0].change is None
    assert found[3].activation == pytest.approx(float(latents.values[0]), rel=1e-4)
    for change, token, plain_V, ablated_V in zip(found[1:], TOKENS[1:], plain_TV, ablated_TV, strict=False):
        assert change.logprob == pytest.approx(float(plain_V[token]), abs=1e-4)
        assert change.change == pytest.approx(float(ablated_V[token] - plain_V[token]), abs=1e-4)
    assert any(abs(change.change or 0.0) > 1e-3 for change in found)

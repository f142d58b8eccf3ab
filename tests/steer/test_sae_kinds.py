"""The engine and the screen with SAEs of every kind."""

import pytest
import torch

from llama_3.hooks import HookPoint
from sae.checkpoint import Stats
from sae.intervene import Record, Steerer
from sae.model import SAE, Latents, SAEConfig
from steer.device import sae_bytes
from steer.edits import Edit, SteeringSet
from steer.engine import Engine
from steer.events import Finished, LatentHit, PromptRead, TokenEvent
from steer.resolve import Resolver, by_hook
from steer.session import Prompt, Session
from steer.steerers import WIDE, hits_by_row
from steer.tui.status import headline
from tests.sae.reference import KINDS, NORMALISE
from tests.tiny import byte_tokenizer, tiny_config, tiny_model

D, F = 32, 64


def sae_of(kind: str, normalise: str = "none") -> SAE:
    generator = torch.Generator().manual_seed(3)
    k, plain = 8 if kind in ("topk", "batchtopk") else 0, kind == "prolu_plain"
    activation = "prolu" if plain else kind
    sae = SAE(SAEConfig(D, F, activation, k, "blocks.0.hook_resid_post", normalise, prolu_plain=plain))
    sae.W_dec_FD.copy_(torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=1))
    sae.W_enc_FD.copy_(sae.W_dec_FD)
    for name in sae.config.function.extra:
        sae.weights[name].fill_(0.01)
    sae.stats = Stats(torch.full((F,), 2.0), torch.ones(F), torch.full((F,), 0.1), 4.0, 1000)
    return sae


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalise", ["none", "layer_norm"])
def test_a_reply_is_watched_and_steered_with_every_kind(kind: str, normalise: str) -> None:
    sae, steering = sae_of(kind, normalise), SteeringSet((Edit.parse("clamp 5 1.5x"), Edit.parse("bias 7 2")))
    engine = Engine(tiny_model(), byte_tokenizer(), sae)
    events = list(engine.stream([Prompt(text="Once upon a time")], [steering], seeds=[0], max_tokens=6))
    [end] = [event for event in events if isinstance(event, Finished)]
    assert end.report.steered and all(edit.positions for edit in end.report.edits)
    [prompt] = [event for event in events if isinstance(event, PromptRead)]
    ids = torch.tensor([[event.token for event in prompt.tokens]])
    resid_TD = engine.model.forward(ids, stop_after=HookPoint.parse(sae.config.hook))[0]
    read = [event for event in events if isinstance(event, TokenEvent)]
    assert prompt.tokens[0].hits == () and all(event.hits for event in read)
    for place, event in enumerate(prompt.tokens[1:], 1):
        latents = sae.encode(resid_TD[place])
        assert {hit.latent for hit in event.hits} == set(latents.indices[latents.values > 0].tolist())
        strengths = [hit.activation for hit in event.hits]
        assert strengths == sorted(strengths, reverse=True)
        assert strengths == pytest.approx(latents.values[latents.values > 0].tolist(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_headline_names_the_kind(kind: str) -> None:
    engine = Engine(tiny_model(), byte_tokenizer(), sae_of(kind))
    named = {"topk": "topk-8", "batchtopk": "batchtopk-8", "prolu_plain": "prolu"}.get(kind, kind)
    assert f" 64 {named} " in headline(Session(engine), 120)
    assert sae_of(kind).config.kind == named


@pytest.mark.parametrize("normalise", NORMALISE)
def test_a_share_of_the_norm_moves_a_median_residual_by_that_share(normalise: str) -> None:
    sae = sae_of("jumprelu", normalise)
    edit = Edit.parse("9 +30%")
    resolver = Resolver(tiny_config(), by_hook([sae]))
    [compiled] = resolver.compile(SteeringSet((edit,))).values()
    x = torch.randn(1, 2, D, generator=torch.Generator().manual_seed(2))
    x -= x.mean(-1, keepdim=True)
    x *= 4.0 / x.norm(dim=-1, keepdim=True)
    y = Steerer(sae, sets={0: compiled})(x, Two())
    assert float((y - x)[0, 1].norm()) == pytest.approx(0.3 * 4.0, rel=1e-5)
    readout = resolver.readout(edit)
    assert readout is not None and readout.raw == compiled.edits[0].value
    assert readout.of_norm == pytest.approx(30)


class Two:
    """Two positions of one row."""

    positions_BT = torch.tensor([[0, 1]])
    tokens_BT = torch.tensor([[65, 66]])
    rows = (0,)
    generated_BT = torch.tensor([[False, True]])
    prompt_lengths_B = torch.tensor([2])


@pytest.mark.parametrize("kind", KINDS)
def test_its_memory_is_that_of_its_weights(kind: str) -> None:
    sae = sae_of(kind)
    assert sae_bytes(sae.config) == 4 * sum(weight.numel() for weight in sae.parameters())


@pytest.mark.parametrize("wide", [2, WIDE + 50])
def test_hits_leave_out_what_is_inactive_and_tokens_that_are_not_read(wide: int) -> None:
    values_BTK = torch.zeros(2, 3, wide)
    values_BTK[0, 0] = 1.0  # the first token lights everything
    values_BTK[0, 1, 0], values_BTK[1, 2, :2] = 2.0, torch.tensor([1.0, 3.0])
    indices_BTK = torch.arange(wide).expand(2, 3, wide) + 70_000
    positions_BT, readable_BT = torch.tensor([[0, 1, 2], [-1, 0, 1]]), torch.tensor([[0, 1, 1], [0, 0, 1]]) > 0
    found = hits_by_row(Record((4, 9), positions_BT, Latents(indices_BTK, values_BTK), readable_BT))
    assert found == {
        4: [(), (LatentHit(70_000, 2.0),), ()],
        9: [(), (LatentHit(70_001, 3.0), LatentHit(70_000, 1.0))],
    }

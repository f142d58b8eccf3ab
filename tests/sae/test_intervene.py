"""What a steerer adds, reports and leaves alone."""

import pytest
import torch

from sae.compiled import CompiledEdit, CompiledSet
from sae.intervene import Steerer, Tally
from tests.sae.places import SPECIAL, place
from tests.sae.reference import KINDS, NORMALISE, D, F, K, Reference, make_sae


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalise", NORMALISE)
def test_dropped_errors_and_reports_of_every_kind_equal_a_float64_loop(kind: str, normalise: str) -> None:
    sae, x = make_sae(kind, normalise), torch.randn(1, 4, D, generator=torch.Generator().manual_seed(5)) * 3 + 1
    of, latent = Reference(sae), int(sae.encode(x[:, 1:]).indices[0, 1, 0])
    edit = CompiledEdit("add", latent, 1.5)
    steerer = Steerer(sae, sets={0: CompiledSet((edit,), drop_error=True)})
    y = steerer(x, place(1, 4))
    before, after = [], []
    for t in range(1, 4):
        x_D = x[0, t].double().tolist()
        f = of.encode(x_D).f
        f[latent] += 1.5
        wanted = of.decode(f, x_D)
        torch.testing.assert_close(y[0, t].double(), torch.tensor(wanted, dtype=torch.float64), atol=1e-4, rtol=1e-5)
        before.append(f[latent] - 1.5)
        read = float(sae.pre_activations(torch.tensor(wanted))[latent])
        after.append(max(read, 0.0) if kind == "topk" else of.encode(wanted).f[latent])
    tally = Tally.of(steerer.traces[0, edit])
    assert tally.before == pytest.approx(sum(before) / 3, abs=1e-5) and max(before) > 0
    assert tally.after == pytest.approx(sum(after) / 3, abs=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.5, -2.0])
def test_clamp_moves_the_stream_by_the_difference_of_two_decodings(value: float) -> None:
    sae, x = make_sae(), torch.randn(1, 6, D)
    f = sae.encode(x)
    latent = int(f.indices[0, 2, 0])
    y = Steerer(sae, sets={0: CompiledSet((CompiledEdit("clamp", latent, value),))})(x, place(1, 6))
    dense = torch.zeros(6, F).scatter_(1, f.indices[0], f.values[0])
    clamped = dense.clone()
    clamped[:, latent] = value
    moved = (clamped - dense) @ sae.W_dec_FD
    moved[0] = 0
    torch.testing.assert_close(y[0] - x[0], moved, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_set_returns_the_very_same_tensor(dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, D).to(dtype)
    steerer = Steerer(make_sae(), recording=True, sets={0: CompiledSet(), 1: CompiledSet()})
    assert steerer(x, place(2, 4)) is x
    [record] = steerer.records
    assert record.latents.values.shape == (2, 4, K)


def test_first_token_specials_and_padding_keep_their_bits() -> None:
    x = torch.randn(1, 6, D, dtype=torch.bfloat16)
    where = place(1, 6)
    where.tokens_BT[0, 2] = SPECIAL
    where.positions_BT[0, 5] = -1
    edit = CompiledSet((CompiledEdit("add", 3, 5.0),))
    y = Steerer(make_sae(), {SPECIAL}, sets={0: edit})(x, where)
    changed = (y != x).any(-1)[0].tolist()
    assert changed == [False, True, False, True, True, False]
    y = Steerer(make_sae(), {SPECIAL}, sets={0: CompiledSet(edit.edits, special_tokens=True)})(x, where)
    assert (y != x).any(-1)[0].tolist() == [True] * 5 + [False]


def test_rows_with_different_sets_equal_the_same_rows_alone() -> None:
    sae, x = make_sae(), torch.randn(4, 5, D)
    shared = CompiledSet((CompiledEdit("clamp", 7, 2.0), CompiledEdit("bias", 3, 1.0)))
    sets = {4: shared, 5: CompiledSet((CompiledEdit("add", 1, 3.0),)), 9: shared}
    rows = (4, 5, 6, 9)
    together = Steerer(sae, sets=sets)(x, place(4, 5, rows_named=rows))
    for number, row in enumerate(rows):
        alone = Steerer(sae, sets=sets)(x[number : number + 1], place(1, 5, rows_named=(row,)))
        torch.testing.assert_close(together[number], alone[0], atol=1e-6, rtol=1e-6)
    assert torch.equal(together[2], x[2])


def test_dropping_the_error_leaves_the_edited_reconstruction() -> None:
    sae, x = make_sae(), torch.randn(1, 4, D)
    compiled = CompiledSet((CompiledEdit("add", 2, 1.5),), drop_error=True)
    y = Steerer(sae, sets={0: compiled})(x, place(1, 4))
    wanted = sae.decode(sae.encode(x)) + 1.5 * sae.decoder_direction(2)
    torch.testing.assert_close(y[0, 1:], wanted[0, 1:], atol=1e-6, rtol=1e-6)
    assert torch.equal(y[0, 0], x[0, 0])


def test_tallies_count_positions_means_and_lost_races() -> None:
    sae, x = make_sae(), torch.randn(1, 6, D)
    f = sae.encode(x)
    weak = int(sae.pre_activations(x).sum((0, 1)).argmin())
    edits = (CompiledEdit("ablate", int(f.indices[0, 4, 0])), CompiledEdit("bias", weak, 1e-4))
    steerer = Steerer(sae, sets={0: CompiledSet(edits)})
    steerer(x[:, :4], place(1, 4))
    later = place(1, 2)
    later.positions_BT += 4
    steerer(x[:, 4:], later)
    ablate, bias = (Tally.of(steerer.traces[0, edit]) for edit in edits)
    active = torch.where(f.indices[0] == edits[0].latent, f.values[0], 0.0).sum(-1)[1:]
    assert (ablate.positions, ablate.first, ablate.last) == (5, 1, 5)
    assert ablate.before == pytest.approx(float(active.mean()), rel=1e-5)
    assert bias.lost == 5
    assert steerer.applied == {0: 2}


def test_a_bias_that_loses_the_race_changes_nothing_and_a_large_one_evicts() -> None:
    sae, x = make_sae(), torch.randn(1, 3, D)
    pre = sae.pre_activations(x)[0, 2]
    outsider = int(pre.argmin())
    small = Steerer(sae, sets={0: CompiledSet((CompiledEdit("bias", outsider, 1e-3),))})(x, place(1, 3))
    torch.testing.assert_close(small, x, atol=1e-6, rtol=0)
    push = float(pre.max() - pre[outsider]) + 1
    large = Steerer(sae, sets={0: CompiledSet((CompiledEdit("bias", outsider, push),))})(x, place(1, 3))
    weakest = int(sae.encode(x).indices[0, 2, -1])
    moved = (large - x)[0, 2]
    lost = float(sae.encode(x).values[0, 2, -1])
    gained = float(pre[outsider]) + push
    wanted = gained * sae.decoder_direction(outsider) - lost * sae.decoder_direction(weakest)
    torch.testing.assert_close(moved, wanted, atol=1e-5, rtol=1e-5)

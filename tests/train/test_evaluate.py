"""Measures against plain float64 loops over one context at a time, intervals against theory, and the command."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_3.hooks import HookPoint, Hooks, Span
from sae.activations import ACTIVATIONS
from sae.checkpoint import save_sae
from sae.model import SAE, SAEConfig
from steer.cli import main
from tests.tiny import byte_tokenizer, tiny_model, write_tiny_checkpoint
from train import evaluate as evaluation
from train.errors import TrainError
from train.evaluate import METRICS, Evaluation, assess, evaluate
from train.intervals import UNITS, DocumentSums, share
from train.text import TextPlan, is_held_out

HOOK = "blocks.0.hook_resid_post"
TEXTS = ["the cat sat " * n for n in range(1, 9)]
CONTEXT = 40


@pytest.fixture
def text(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    file = tmp_path / "t.txt"
    file.write_text("\n<|endoftext|>\n".join(TEXTS))
    return file


def random_sae(activation: str = "topk", normalise: str = "none", d_sae: int = 48) -> SAE:
    k = 5 if activation in ("topk", "batchtopk") else 0
    sae = SAE(SAEConfig(d_in=32, d_sae=d_sae, activation=activation, k=k, hook=HOOK, normalise=normalise))
    generator = torch.Generator().manual_seed(1)
    for name, weight in sae.weights.items():
        weight.copy_(torch.randn(weight.shape, generator=generator) * (0.3 if weight.dim() == 2 else 0.1))
        if name == "threshold":
            weight.abs_()
    return sae


def perfect_sae() -> SAE:
    sae = SAE(SAEConfig(d_in=32, d_sae=64, activation="relu", k=0, hook=HOOK))
    for half, sign in ((slice(0, 32), 1.0), (slice(32, 64), -1.0)):
        sae.W_enc_FD[half], sae.W_dec_FD[half] = sign * torch.eye(32), sign * torch.eye(32)
    return sae


def values(found: Evaluation) -> dict[str, float]:
    return {each.metric: each.value for each in found.metrics}


def reference(sae: SAE) -> dict[str, float]:
    """Every measure of a TopK SAE on all of TEXTS: one context at a time, dense, in float64."""
    model, point = tiny_model().double(), HookPoint.parse(HOOK)
    weights = {name: weight.double() for name, weight in sae.weights.items()}
    contexts = []
    for document in TEXTS:
        tokens = list(document.strip().encode())
        contexts += [[256, *tokens[i : i + CONTEXT - 1]] for i in range(0, len(tokens), CONTEXT - 1)]

    def logits(tokens: list[int], put: Tensor | None = None) -> Tensor:
        def hook(resid_BTD: Tensor, span: Span) -> Tensor:
            assert put is not None
            return torch.cat([resid_BTD[:, :1], put[None].expand(-1, len(tokens) - 1, -1)], 1)

        hooks = Hooks()
        if put is not None:
            hooks.add(point, hook)
        return model(torch.tensor([tokens]), hooks=hooks)[0, :-1].log_softmax(-1)  # type: ignore[no-any-return]  # nn.Module

    residuals = [model(torch.tensor([tokens]), stop_after=point)[0, 1:] for tokens in contexts]
    x_ND = torch.cat(residuals)
    mean_D = x_ND.mean(0)
    totals = dict.fromkeys(("clean", "spliced", "zero", "mean", "kl", "count", "active", "cosine", "relative"), 0.0)
    seen, y_parts = set(), []
    for tokens, x_TD in zip(contexts, residuals, strict=True):
        y_TD = torch.zeros_like(x_TD)
        for t, x_D in enumerate(x_TD):
            pre_F = weights["W_enc"] @ (x_D - weights["b_dec"]) + weights["b_enc"]
            chosen = [int(i) for i in pre_F.argsort(descending=True)[: sae.config.k] if pre_F[i] > 0]
            seen.update(chosen)
            totals["active"] += len(chosen)
            y_TD[t] = sum((pre_F[i] * weights["W_dec"][i] for i in chosen), weights["b_dec"])
            totals["cosine"] += float(x_D @ y_TD[t] / x_D.norm() / y_TD[t].norm())
            totals["relative"] += float((x_D - y_TD[t]).pow(2).sum() / x_D.pow(2).sum())
        y_parts.append(y_TD)
        clean_TV = logits(tokens)
        puts = {"spliced": y_TD, "zero": torch.zeros(1, 32).double(), "mean": mean_D[None]}
        after = {"clean": clean_TV} | {name: logits(tokens, put) for name, put in puts.items()}
        for t, token in enumerate(tokens[1:]):
            for name, log_TV in after.items():
                totals[name] -= float(log_TV[t, token])
            p_V, q_V = clean_TV[t], after["spliced"][t]
            totals["kl"] += float((p_V.exp() * (p_V - q_V)).sum())
            totals["count"] += 1
    error = float((x_ND - torch.cat(y_parts)).pow(2).sum())
    ce = {name: totals[name] / totals["count"] for name in ("clean", "spliced", "zero", "mean")}
    return {
        "mse": error / len(x_ND),
        "normalised_mse": totals["relative"] / len(x_ND),
        "fvu": error / float((x_ND - mean_D).pow(2).sum()),
        "cosine": totals["cosine"] / len(x_ND),
        "l0": totals["active"] / len(x_ND),
        "dead": 1 - len(seen) / sae.config.d_sae,
        **{f"ce_{name}": value for name, value in ce.items()},
        "delta_ce": ce["spliced"] - ce["clean"],
        "loss_recovered_zero": (ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["clean"]),
        "loss_recovered_mean": (ce["mean"] - ce["spliced"]) / (ce["mean"] - ce["clean"]),
        "kl": totals["kl"] / totals["count"],
    }


def test_every_measure_is_that_of_a_plain_float64_loop(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = random_sae()
    monkeypatch.setattr(evaluation, "PRE_ACTIVATIONS", 48 * 7)  # a few rows at a time
    plan = TextPlan(context=CONTEXT)
    found = assess(tiny_model(), sae, byte_tokenizer(), [text], 10**6, plan=plan, batch_tokens=100)
    expected = reference(sae)
    assert list(values(found)) == [name for section in METRICS.values() for name in section] == list(expected)
    for name, value in expected.items():
        assert values(found)[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name
    assert found.documents == len(TEXTS) and found.tokens == sum(len(document.strip()) for document in TEXTS)
    for each in found.metrics:
        assert each.low <= each.value <= each.high and math.isfinite(each.low) and math.isfinite(each.high), each
    assert found.metrics[0].low < found.metrics[0].high


def test_a_perfect_sae_costs_nothing_and_recovers_all(text: Path) -> None:
    found = values(assess(tiny_model(), perfect_sae(), byte_tokenizer(), [text], 300, plan=TextPlan(context=CONTEXT)))
    for name in ("mse", "normalised_mse", "fvu", "delta_ce", "kl"):
        assert found[name] == pytest.approx(0, abs=1e-5), name
    for name in ("cosine", "loss_recovered_zero", "loss_recovered_mean"):
        assert found[name] == pytest.approx(1, abs=1e-5), name


def test_an_sae_that_gives_the_mean_is_the_mean_ablation(text: Path) -> None:
    model, point = tiny_model(), HookPoint.parse(HOOK)
    contexts = [[256, *document.strip().encode()][:CONTEXT] for document in TEXTS]
    file = text.parent / "short.txt"
    file.write_text("\n<|endoftext|>\n".join(bytes(context[1:]).decode() for context in contexts))
    x_ND = torch.cat([model(torch.tensor([context]), stop_after=point)[0, 1:] for context in contexts])
    constant = SAE(SAEConfig(d_in=32, d_sae=8, k=2, hook=HOOK))
    constant.b_enc_F.fill_(-1)
    constant.b_dec_D.copy_(x_ND.mean(0))
    found = values(assess(model, constant, byte_tokenizer(), [file], 10**6, plan=TextPlan(context=CONTEXT)))
    assert found["fvu"] == pytest.approx(1, abs=1e-4) and found["dead"] == 1 and found["l0"] == 0
    assert found["ce_spliced"] == pytest.approx(found["ce_mean"], abs=1e-4)
    assert found["loss_recovered_mean"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("normalise", ["none", "layer_norm", "unit_norm"])
def test_every_kind_of_sae_is_measured(activation: str, normalise: str, text: Path) -> None:
    sae = random_sae(activation, normalise)
    found = evaluate(tiny_model(), sae, byte_tokenizer(), [text], 100, context=CONTEXT)
    rows = tiny_model()(torch.tensor([[256, *TEXTS[2].strip().encode()]]), stop_after=HookPoint.parse(HOOK))[0, 1:]
    latents = sae.encode(rows)
    assert (sae.decode(latents, rows) - rows).pow(2).sum() > 0 and found["mse"] > 0
    assert all(math.isfinite(value) for value in found.values()) and found["tokens"] >= 100
    assert {"fvu", "l0", "dead", "ce_clean", "ce_spliced", "delta_ce", "tokens"} <= set(found)


def test_a_section_alone_gives_its_own_measures_and_the_same_ones(text: Path) -> None:
    sae, plan = random_sae(), TextPlan(context=CONTEXT)
    both = values(assess(tiny_model(), sae, byte_tokenizer(), [text], 200, plan=plan))
    for section in METRICS:
        alone = values(assess(tiny_model(), sae, byte_tokenizer(), [text], 200, plan=plan, sections=[section]))
        assert list(alone) == list(METRICS[section])
        assert alone == pytest.approx({name: both[name] for name in alone})
    with pytest.raises(TrainError, match="no section 'size'"):
        assess(tiny_model(), sae, byte_tokenizer(), [text], 200, sections=["size"])
    with pytest.raises(TrainError, match="at least one section"):
        assess(tiny_model(), sae, byte_tokenizer(), [text], 200, sections=[])


def test_the_held_out_part_is_read_alone(text: Path) -> None:
    plan = TextPlan(context=CONTEXT, held_out=0.4, part="held-out")
    found = assess(tiny_model(), random_sae(), byte_tokenizer(), [text], 10**6, plan=plan, sections=["reconstruction"])
    held = [document.strip() for number, document in enumerate(TEXTS) if is_held_out(number, 0.4)]
    assert 0 < found.documents == len(held) < len(TEXTS) and found.tokens == sum(map(len, held))


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator, inside = torch.Generator().manual_seed(0), 0
    for trial in range(100):
        sums, documents_N = DocumentSums(), torch.arange(60).repeat_interleave(5)
        shift_N = torch.randn(60, generator=generator).repeat_interleave(5)  # tokens of a document are alike
        sums.add(documents_N, x=shift_N + 0.1 * torch.randn(300, generator=generator), n=torch.ones(300))
        (found,) = sums.metrics({"mean": lambda sums: sums["x"] / sums["n"]}, trial)
        assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(60), rel=0.45)
        inside += found.low <= 0 <= found.high
    assert 86 <= inside <= 100


def test_an_interval_is_as_wide_as_95_percent_ask_for() -> None:
    x_N = torch.randn(400, generator=torch.Generator().manual_seed(0))
    sums = DocumentSums()
    sums.add(torch.arange(400), x=x_N, n=torch.ones(400))
    (found,) = sums.metrics({"mean": lambda sums: sums["x"] / sums["n"]}, 0)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * float(x_N.std()) / 20, rel=0.08)


def test_resamples_are_drawn_by_the_seed_and_one_document_has_no_interval() -> None:
    formulas = {"mean": lambda sums: sums["x"] / sums["n"]}
    sums = DocumentSums()
    sums.add(torch.tensor([4, 4, 9]), x=torch.tensor([1.0, 2.0, 6.0]), n=torch.ones(3))
    assert sums.metrics(formulas, 1) == sums.metrics(formulas, 1) and sums.metrics(formulas, 1)[0].value == 3
    assert sums.metrics(formulas, 1)[0].low == pytest.approx(1.5) and sums.metrics(formulas, 1)[0].high == 6
    sums.add(torch.tensor([4 + UNITS]), x=torch.tensor([3.0]), n=torch.ones(1))
    assert sums.documents == {4, 9, 4 + UNITS} and sums.metrics(formulas, 1)[0].low == 2, "units share a row"
    alone = DocumentSums()
    alone.add(torch.tensor([7]), x=torch.tensor([5.0]), n=torch.ones(1))
    (only,) = alone.metrics(formulas, 0)
    assert only.value == 5 and math.isnan(only.low) and math.isnan(only.high)


def test_the_interval_of_a_share_is_wilsons() -> None:
    some = share("dead", 10, 100)
    assert (
        some.value == 0.1
        and some.low == pytest.approx(0.0552, abs=1e-4)
        and some.high == pytest.approx(0.1744, abs=1e-4)
    )
    assert share("dead", 0, 50).low == 0 and share("dead", 0, 50).high > 0.05


def test_the_command_prints_and_writes_every_metric(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_tiny_checkpoint(tmp_path / "model")
    save_sae(tmp_path / "sae", random_sae(), None, {})
    base = ["evaluate", str(text), "--model", "model", "--sae", "sae", "--max-tokens", "150", "--context", "40"]

    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        found, (out, err) = main([*base, *arguments]), capsys.readouterr()
        assert found == code, err
        return out, err

    out, _ = run("--json", "--report", "r.json", "--sections", "reconstruction, downstream")
    entries: list[dict[str, Any]] = [json.loads(line) for line in out.splitlines()]
    assert [entry["metric"] for entry in entries] == [name for section in METRICS.values() for name in section]
    assert all(set(entry) == {"metric", "value", "low", "high"} for entry in entries)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["metrics"] == entries and report["hook"] == HOOK and report["tokens"] >= 150
    out, _ = run("--report", "r.md", "--sections", "downstream")
    assert out.splitlines()[0].split() == ["metric", "value", "low", "high"] and "loss_recovered_mean" in out
    table = (tmp_path / "r.md").read_text()
    assert "| kl | " in table and "| mse |" not in table and "| metric | value | low | high | meaning |" in table
    for arguments, why in (
        (("--sections", "size"), "no section 'size'"),
        (("--max-tokens", "0"), "--max-tokens is 0"),
        (("--report", "nowhere/r.md"), "no folder `nowhere`"),
        (("--held-out", "2"), "share is 2"),
        (("--sae", "none"), "this reads one SAE, and 2 are given"),
    ):
        assert why in run(*arguments, code=1)[1]

"""Whether an SAE is the right one: each wrong pairing is planted on the demo, and its own check must name it."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_3.checkpoint import load_model
from llama_3.hooks import HookPoint
from llama_3.model import Transformer
from llama_3.tokenizer import Tokenizer, load_tokenizer
from sae.checkpoint import load_sae, save_sae
from sae.model import SAE, SAEConfig
from steer.analysis.checkup import Finding, Recorded, examine, glance, most, suspicion
from steer.analysis.probing import in_float32, residuals, write_text
from steer.analysis.readings import fit, normalise_readings, places
from steer.cli import main
from steer.config import DEMO_MODEL, DEMO_SAE
from steer.edits import Edit
from steer.engine import Engine
from steer.errors import SteerError
from tests.tiny import byte_tokenizer, tiny_config, tiny_model

STORIES = """\
Once upon a time there was a little girl named Lily. She loved to play in the garden with her dog. One day, the dog ran
to the river and saw a big fish. The fish was sad. "Why are you sad?" asked Lily. "I lost my friend," said the fish.
<|endoftext|>
Tom had a red ball. He threw the ball high in the air and it fell in a tree. His mom came out of the house with a long
stick. She hit the ball and it came down. Tom was very happy and gave his mom a big hug. They went home to eat soup.
<|endoftext|>
The old bear lived in a cave near the mountain. Every winter he slept until the snow was gone. This year a small bird
woke him up. "The flowers are here," sang the bird. The bear smiled, rubbed his eyes and went out to look for honey.
"""
DIAGNOSES = ("hook", "normalise", "weights", "k", "bos", "dtype", "pair")
"""The checks that name a fault; the others give figures."""
Pair = tuple[Transformer, SAE]


class Demo:
    """The shipped model in float32, its SAE and a text, and what can be done wrong with them."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.model, self.sae = load_model(DEMO_MODEL, "float32"), load_sae(DEMO_SAE)
        self.tokenizer: Tokenizer = load_tokenizer(DEMO_MODEL)
        self.text = folder / "stories.txt"
        self.text.write_text(STORIES)

    def examine(self, model: Transformer, sae: SAE) -> dict[str, Finding]:
        return {each.check: each for each in examine(model, sae, self.tokenizer, self.text, tokens=100)}

    def changed(
        self, *, recorded: bool = True, weights: dict[str, torch.Tensor] | None = None, **config: object
    ) -> SAE:
        """The SAE with other weights or settings, and with or without what is recorded of it."""
        held = {name: weight.data for name, weight in self.sae.weights.items()} | (weights or {})
        sae = SAE.of(replace(self.sae.config, **config), held)  # type: ignore[arg-type]  # fields by name
        if recorded:
            sae.stats, sae.manifest = self.sae.stats, self.sae.manifest
        return sae

    def scaled(self, factor: float) -> SAE:
        """An SAE that was trained on inputs times `factor`, and whose folder does not say so."""
        sae = self.sae
        return self.changed(
            weights={"W_enc": sae.W_enc_FD / factor, "W_dec": sae.W_dec_FD * factor, "b_dec": sae.b_dec_D * factor}
        )

    def louder(self, factor: float) -> Pair:
        """A model whose residual stream is larger throughout, in float16, and the SAE that belongs to it."""
        model = copy.deepcopy(self.model)
        model.embedding_VD.data *= factor
        for block in model.blocks:
            block.attention.out.weight.data *= factor
            block.feed_forward.down.weight.data *= factor
        return model.half(), self.scaled(factor)

    def permuted(self) -> Transformer:
        """The same function in another basis of the residual stream: another model of the same width."""
        model, order = copy.deepcopy(self.model), torch.randperm(384, generator=torch.Generator().manual_seed(0))
        model.embedding_VD.data = model.embedding_VD.data[:, order]
        for block in model.blocks:
            for norm in (block.attention_norm, block.feed_forward_norm):
                norm.weight.data = norm.weight.data[order]
            for reads in (block.attention.qkv, block.feed_forward.gate_up):
                reads.weight.data = reads.weight.data[:, order]
            for writes in (block.attention.out, block.feed_forward.down):
                writes.weight.data = writes.weight.data[order]
        return model

    def heeding_bos(self) -> Transformer:
        """A model whose BOS writes much into every later token; without BOS it is the demo, on which the SAE was
        trained."""
        model = copy.deepcopy(self.model)
        block = model.blocks[0]
        normed_VD = block.attention_norm(model.embedding_VD.data)
        rare_D = torch.linalg.svd(normed_VD, full_matrices=False)[2][-1]  # where hardly any token reaches
        embedding = model.embedding_VD.data.clone()
        embedding[self.tokenizer.bos_id] = rare_D / block.attention_norm.weight.data
        model.embedding_VD.data = embedding
        heads = model.config.n_kv_heads * model.config.head_dim
        shout = torch.randn(heads, generator=torch.Generator().manual_seed(0))
        block.attention.qkv.weight.data[-heads:] += 6 * torch.outer(shout, rare_D)
        return model


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.analysis.checkup.PROBED", 120)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return Demo(tmp_path_factory.mktemp("text"))


def transposed(weight_FD: torch.Tensor) -> torch.Tensor:
    """What a reader gets that takes a file's (D, F) for (F, D)."""
    return weight_FD.t().contiguous().view(weight_FD.shape)


FAULTS: dict[str, tuple[Callable[[Demo], Pair], str, str]] = {
    "one layer too high": (
        lambda demo: (demo.model, demo.changed(hook="blocks.4.hook_resid_post")),
        "hook", "fits blocks.3.hook_resid_post better than the blocks.4.hook_resid_post it names: FVU 0.",
    ),
    "one layer too low": (
        lambda demo: (demo.model, demo.changed(hook="blocks.2.hook_resid_post")),
        "hook", "fits blocks.3.hook_resid_post better than the blocks.2.hook_resid_post it names",
    ),
    "attn_out for resid": (
        lambda demo: (demo.model, demo.changed(hook="blocks.3.hook_attn_out")),
        "hook", "fits blocks.3.hook_resid_post better than the blocks.3.hook_attn_out it names",
    ),
    "inputs were scaled in training": (
        lambda demo: (demo.model, demo.scaled(1 / 48)),
        "normalise", "fits inputs scaled to a mean length of sqrt(384) (times 0.0",
    ),
    "inputs were of length 1 in training": (
        lambda demo: (demo.model, demo.scaled(1 / 940)),
        "normalise", "fits inputs scaled to a mean length of 1 (times 0.00",
    ),
    "a normalisation that there was not": (
        lambda demo: (demo.model, demo.changed(normalise="layer_norm")),
        "normalise", "fits inputs that are not normalised better than inputs normalised by layer_norm",
    ),
    "transposed encoder": (
        lambda demo: (demo.model, demo.changed(weights={"W_enc": transposed(demo.sae.W_enc_FD.data)})),
        "weights", "fits with its encoder transposed better than as its file has it",
    ),
    "transposed decoder": (
        lambda demo: (demo.model, demo.changed(weights={"W_dec": transposed(demo.sae.W_dec_FD.data)})),
        "weights", "fits with its decoder transposed better than as its file has it",
    ),
    "exchanged matrices": (
        lambda demo: (
            demo.model,
            demo.changed(weights={"W_enc": demo.sae.W_dec_FD.data, "W_dec": demo.sae.W_enc_FD.data}),
        ),
        "weights", "fits with encoder and decoder exchanged better than",
    ),
    "rows that do not belong together": (
        lambda demo: (demo.model, demo.changed(weights={"W_enc": demo.sae.W_enc_FD.data.roll(1, 0)})),
        "weights", "its encoder and decoder do not belong together",
    ),
    "k too small": (
        lambda demo: (demo.model, demo.changed(k=4)), "k", "its k is 4, and 32.0 latents a token were on when",
    ),
    "k too large": (
        lambda demo: (demo.model, demo.changed(k=64)), "k", "its k is 64, and 32.0 latents a token were on when",
    ),
    "k too small and nothing recorded": (
        lambda demo: (demo.model, demo.changed(recorded=False, k=8)),
        "k", "fits with k 32 better than with the k 8 it names",
    ),
    "trained on text without BOS": (
        lambda demo: (demo.heeding_bos(), demo.sae), "bos", "fits text without BOS better than text with BOS 4080",
    ),
    "another model of the same width": (
        lambda demo: (demo.permuted(), demo.sae), "pair", "it is another model's of the same width",
    ),
    "an untrained model of the same shape": (
        lambda demo: (tiny_model(3, demo.model.config), demo.sae), "pair", "it is another model's of the same width",
    ),
    "float16 overflows above the hook": (
        lambda demo: demo.louder(32), "dtype", "in float16 the model's logits are no numbers: it overflows above",
    ),
}  # fmt: skip


@pytest.mark.parametrize("recorded", [True, False])
def test_the_right_pairing_passes_every_check(demo: Demo, recorded: bool) -> None:
    found = demo.examine(demo.model, demo.changed(recorded=recorded))
    assert [each.message for each in found.values() if not each.ok] == []
    assert tuple(found) == ("text", "fvu", "l0", "cost", *DIAGNOSES)
    assert found["fvu"].value == pytest.approx(0.1, abs=0.04) and found["l0"].value == 32
    assert isinstance(found["cost"].value, float) and abs(found["cost"].value) < 0.2
    assert found["text"].message.endswith("tokens of stories.txt")
    assert "0.100 is recorded" in found["fvu"].message if recorded else "none is recorded" in found["fvu"].message
    assert "next blocks.3.hook_resid_mid" in found["hook"].message


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_pairing_is_named(demo: Demo, fault: str) -> None:
    plant, check, words = FAULTS[fault]
    found = demo.examine(*plant(demo))
    assert {name for name in DIAGNOSES if not found[name].ok} == {check}
    assert words in found[check].message and found[check].hint


def test_float16_that_overflows_at_the_hook_leaves_nothing_else_to_measure(demo: Demo) -> None:
    model, sae = demo.louder(128)
    [finding] = examine(model, sae, demo.tokenizer, demo.text, tokens=100)
    assert finding.check == "dtype" and not finding.ok
    assert "in float16 the residual at blocks.3.hook_resid_post is no number on " in finding.message
    assert "it overflows at 65,504 and goes up to 1" in finding.message
    assert "in float32 the FVU is 0." in finding.message and "bfloat16" in str(finding.hint)
    assert "overflows" in str(glance(model, sae, demo.tokenizer))


def test_figures_that_count_the_first_token_are_told(demo: Demo) -> None:
    """A BOS whose residual dwarfs all others, and an SAE with a latent for it alone that does badly on the rest."""
    model = copy.deepcopy(demo.model)
    embedding = model.embedding_VD.data.clone()
    embedding[demo.tokenizer.bos_id] *= 1e4
    model.embedding_VD.data = embedding
    [first_1D] = residuals(model, [[demo.tokenizer.bos_id]], [HookPoint(3, "resid_post")], demo.tokenizer, 0).values()
    alone_D = first_1D[0] / first_1D[0].norm()
    held = {name: demo.sae.weights[name].data.clone() for name in ("W_enc", "W_dec")}
    held["W_enc"] -= torch.outer(held["W_enc"] @ alone_D, alone_D)
    for weight_FD in held.values():
        weight_FD[0] = alone_D
    sae = demo.changed(recorded=False, weights=held, k=8)
    sae.manifest = {"metrics": {"fvu": 0.001, "l0": 8}}
    found = demo.examine(model, sae)
    assert {name for name in DIAGNOSES if not found[name].ok} == {"bos"} and not found["fvu"].ok
    assert "it was trained with the first token in" in found["bos"].message


def test_half_precision_that_suffices_passes(demo: Demo) -> None:
    found = demo.examine(copy.deepcopy(demo.model).half(), demo.sae)
    assert all(each.ok for each in found.values()), found
    assert "of 6.55e+04; in float32 FVU 0." in found["dtype"].message


def test_activations_of_another_size_than_recorded_are_told(demo: Demo) -> None:
    """The reconstruction does not show it; strengths in units of a recorded max would be off."""
    held = {name: getattr(demo.sae, name) for name in ("W_enc_FD", "b_enc_F")}
    weights = {name[:5]: weight.data / 10 for name, weight in held.items()} | {"W_dec": demo.sae.W_dec_FD.data * 10}
    found = demo.examine(demo.model, demo.changed(weights=weights))
    assert found["fvu"].ok and {name for name in DIAGNOSES if not found[name].ok} == {"normalise"}
    assert "its activations are 0.1" in found["normalise"].message


def test_a_glance_finds_what_is_far_off(demo: Demo) -> None:
    assert glance(demo.model, demo.sae, demo.tokenizer) is None
    wrong = demo.changed(hook="blocks.3.hook_attn_out")
    assert "the SAE does not fit this model" in str(glance(demo.model, wrong, demo.tokenizer))
    assert "0.1 is recorded" in str(glance(demo.permuted(), demo.sae, demo.tokenizer))


def test_suspicion_is_a_matter_of_fvu_and_of_enough_tokens() -> None:
    x_ND = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    silent, noted = Recorded(None, None, None, None), Recorded(0.1, None, None, None)
    near_ND, off_ND = (x_ND + by * (x_ND - x_ND.mean(0)) for by in (0.9, 1.0))  # FVU 0.81 and 1
    assert suspicion(x_ND, off_ND, noted) == (
        "the SAE does not fit this model: it leaves 100% of the variance unexplained, where 0.1 is recorded"
    )
    assert suspicion(x_ND, off_ND, silent) is not None
    assert suspicion(x_ND, near_ND, noted) is None and suspicion(x_ND, x_ND, noted) is None
    assert suspicion(x_ND[:8], -x_ND[:8], noted) is None
    assert "overflows" in str(suspicion(x_ND / 0, x_ND, noted))


@pytest.mark.parametrize(("recorded", "bound"), [(None, 0.8), (0.01, 0.21), (0.2, 0.6), (0.5, 0.9), (0.95, 0.95)])
def test_the_largest_fvu_that_is_believed(recorded: float | None, bound: float) -> None:
    assert most(recorded) == pytest.approx(bound)


def test_recorded_figures_come_from_statistics_then_from_the_manifest(demo: Demo) -> None:
    recorded = Recorded.of(demo.sae)
    assert recorded.fvu == pytest.approx(0.0998, abs=1e-4) and recorded.l0 == pytest.approx(32, abs=0.1)
    bare = demo.changed(recorded=False)
    assert Recorded.of(bare) == Recorded(None, None, None, None)
    bare.manifest = {"metrics": {"fvu": float("nan"), "l0": "many"}}
    assert Recorded.of(bare) == Recorded(None, None, None, None)


def test_places_are_those_of_the_sae_s_width_and_each_once(demo: Demo) -> None:
    named = HookPoint(1, "resid_pre")
    found = places(tiny_config(n_layers=4), named, 32)
    assert found[0] == named and HookPoint(0, "resid_post") not in found and len(set(found)) == len(found)
    assert {HookPoint(0, "resid_pre"), HookPoint(3, "resid_post"), HookPoint(2, "mlp_out")} <= set(found)
    assert HookPoint(0, "mlp_out") in places(tiny_config(n_layers=4), HookPoint(3, "mlp_out"), 32)
    assert places(tiny_config(head_dim=16), HookPoint(1, "attn_z"), 64) == (
        HookPoint(1, "attn_z"), HookPoint(0, "attn_z"),
    )  # fmt: skip


def test_layer_norm_that_a_folder_forgot_is_the_best_normalisation() -> None:
    """An SAE that is exact on centred inputs of standard deviation 1, on tokens with a mean of their own."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(200, 16, generator=generator) + 5 * torch.randn(200, 1, generator=generator)
    centre = torch.eye(16) - 1 / 16
    weights = {"W_enc": torch.cat([centre, -centre]), "W_dec": torch.cat([centre, -centre]), "b_enc": torch.zeros(32)}
    weights |= {"b_dec": torch.zeros(16), "threshold": torch.full((32,), 0.2)}
    sae = SAE.of(SAEConfig(16, 32, "jumprelu", 0), weights)
    fits = {reading.name: fit(reading).fvu for reading in normalise_readings(sae, x_ND)}
    assert min(fits, key=lambda name: fits[name]) == "inputs normalised by layer_norm"


def test_residuals_are_what_hooks_see_and_float32_keeps_them(demo: Demo) -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    rows, point = [[256, 65, 66, 265, 67], [256, 70, 71]], HookPoint(0, "resid_mid")
    [x_ND] = residuals(model, rows, [point], tokenizer, 1).values()
    alone_BTD = model(torch.tensor([rows[0]]), stop_after=point)
    assert x_ND.shape == (5, 32) and torch.allclose(x_ND[:3], alone_BTD[0, [1, 2, 4]])
    half = copy.deepcopy(model).bfloat16()
    shallow = in_float32(half, 1)
    assert shallow is not None and shallow.dtype == torch.float32 and len(shallow.blocks) == 1
    [close_ND] = residuals(shallow, rows, [point], tokenizer, 1).values()
    assert 0 < float((close_ND - x_ND).abs().max()) < 0.05


def test_the_model_writes_its_own_text_the_same_every_time(demo: Demo, tmp_path: Path) -> None:
    texts = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        file, source = write_text(demo.model, demo.tokenizer, tmp_path / name, 200, 0)
        texts.append([json.loads(line)["text"] for line in file.read_text().splitlines()])
    assert texts[0] == texts[1] and "the model wrote itself (seed 0)" in source
    assert sum(len(demo.tokenizer.encode(text)) for text in texts[0]) > 150 and "<|" not in "".join(texts[0])
    broken = copy.deepcopy(demo.model)
    broken.norm.weight.data *= math.nan
    file, source = write_text(broken, demo.tokenizer, tmp_path, 200, 0)
    assert "a paragraph of ours" in source and "harbour" in file.read_text()


def test_a_text_without_tokens_is_refused(demo: Demo, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(SteerError, match="holds no text to measure on"):
        examine(demo.model, demo.sae, demo.tokenizer, tmp_path / "empty.txt")


def test_doctor_prints_the_checks(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    save_sae(tmp_path / "wrong", demo.changed(hook="blocks.4.hook_resid_post"))
    assert main(["doctor", "--sae", "wrong", "--text", str(demo.text), "--json"]) == 1
    checks = {entry["check"]: entry for entry in map(json.loads, capsys.readouterr().out.splitlines())}
    assert {"load", "text", "fvu", "l0", "cost", *DIAGNOSES} <= set(checks)
    assert [name for name, entry in checks.items() if not entry["ok"]] == ["hook"]
    assert "hint: write `blocks.3.hook_resid_post` as `hook`" in checks["hook"]["message"]
    (tmp_path / "raw.txt").write_bytes(b"\xff\xfe")
    assert main(["doctor", "--text", "raw.txt"]) == 1
    assert "FAILED  text       raw.txt is not UTF-8 text" in capsys.readouterr().out


def test_nothing_is_steered_with_an_sae_that_fits_nothing(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer.analysis.checkup.glance", glance)
    wrong = SAE.of(demo.sae.config, {name: -weight for name, weight in demo.sae.weights.items()})
    wrong.stats = demo.sae.stats
    save_sae(tmp_path / "sae", wrong)
    edit = Edit.parse("5 +1x")
    engine = Engine.load(DEMO_MODEL, tmp_path / "sae")
    assert "the SAE does not fit this model" in str(engine.info.notice)
    with pytest.raises(SteerError, match="nothing is steered with a wrong SAE"):
        engine.check(edit)
    trusting = Engine.load(DEMO_MODEL, tmp_path / "sae", trust_sae=True)
    assert "the SAE does not fit this model" in str(trusting.info.notice)
    trusting.check(edit)
    assert Engine.load(DEMO_MODEL, DEMO_SAE).info.notice is None

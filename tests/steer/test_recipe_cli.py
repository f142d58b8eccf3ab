"""`steer recipe` and `--recipe` on a tiny real model: what is saved runs again, and what differs is said."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from labels.index import LabelIndex
from sae.checkpoint import Stats, load_sae, save_sae
from steer.edits import Edit
from steer.engine import Engine
from steer.made_with import file_hash, model_hash, tokenizer_hash
from steer.recipe import Recipe
from steer.session import Session
from steer.store import Store
from tests.steer.commands import Ran, Steer, ran
from tests.steer.fake import FakeEngine
from tests.steer.test_engine import tiny_sae
from tests.tiny import tiny_config, write_tiny_checkpoint

HOOK = "blocks.1.hook_resid_post"
WITH = ("--model", "model", "--sae", "sae")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `model`, `sae` and `vector.npy`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("recipes")
    write_tiny_checkpoint(folder / "model")
    save_sae(folder / "sae", tiny_sae(hook=HOOK))
    np.save(folder / "vector.npy", np.linspace(-1, 1, 32, dtype=np.float32))
    return folder


@pytest.fixture
def steer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Steer:
    """Runs a command in a folder of its own, which sees the model, SAE and vector of `folder`."""
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    for name in ("model", "sae", "vector.npy"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, stdin: str = "") -> Ran:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        return ran(capsys, *arguments)

    return run


SET = ("--edit", "12 +1.5x", "--edit", "clamp 4 0 when 9 > 0.5x on generated", "--edit", "vector vector.npy 2")


def test_what_is_saved_runs_again_as_it_was(steer: Steer) -> None:
    plain = steer("complete", "Once", "--json", *SET, "--seed", "3", "--temperature", "0.9", "--max-tokens", "9", *WITH)
    saved = steer("recipe", "save", "r.toml", *SET, "--seed", "3", "--temperature", "0.9", "--max-tokens", "9", *WITH)
    assert (saved.code, saved.out) == (0, "") and "3 edits" in saved.err
    with_recipe = steer("complete", "Once", "--json", "--recipe", "r.toml", *WITH)
    applied = steer("recipe", "apply", "r.toml", "Once", "--json", *WITH)
    assert plain.lines == with_recipe.lines == applied.lines
    assert plain.lines[0]["report"]["steered"] and with_recipe.err == plain.err


def test_a_recipe_holds_what_its_edits_meant(steer: Steer, folder: Path) -> None:
    steer("recipe", "save", "r.toml", *SET, "--notes", "a\nb", "--system", "be brief", "--special-tokens", *WITH)
    recipe = Recipe.read(Path("r.toml"))
    first, second, third = recipe.lines
    assert (first.raw, first.max, first.above) == (3.0, 2.0, None)
    assert (second.raw, second.max, second.above) == (0.0, 2.0, 1.0)
    assert (third.raw, third.sha256) == (2.0, file_hash(folder / "vector.npy"))
    assert recipe.model is not None and recipe.model.sha256 == model_hash(folder / "model")
    assert (recipe.model.tokenizer, recipe.model.width) == (tokenizer_hash(folder / "model"), 32)
    assert recipe.saes[0].sha256 == file_hash(folder / "sae" / "sae.safetensors")
    assert (recipe.saes[0].hook, recipe.saes[0].d_sae, recipe.saes[0].kind) == (HOOK, 64, "topk-8")
    assert (recipe.notes, recipe.system, recipe.special_tokens) == ("a\nb", "be brief", True)


def test_typed_flags_beat_the_recipe_and_the_recipe_beats_steer_toml(steer: Steer) -> None:
    Path("steer.toml").write_text('seed = 7\ntemperature = 0.1\nmodel = "model"\nsae = "sae"\n')
    Path("r.toml").write_text('format = "steer-recipe"\nversion = 1\nseed = 3\nmax_tokens = 2\nerror = "drop"\n')
    [entry] = steer("complete", "Once", "--recipe", "r.toml", "--json").lines
    assert (entry["seed"], len(entry["tokens"])) == (3, 2)
    [entry] = steer("complete", "Once", "--recipe", "r.toml", "--json", "--seed", "4", "--max-tokens", "5").lines
    assert (entry["seed"], len(entry["tokens"])) == (4, 5)
    dropped = steer("complete", "Once", "--recipe", "r.toml", "--json", "--temperature", "0").lines
    kept = steer("complete", "Once", "--recipe", "r.toml", "--json", "--temperature", "0", "--error", "keep").lines
    assert dropped[0]["report"]["applied"] > 0 == kept[0]["report"]["applied"]
    more = steer("complete", "Once", "--recipe", "r.toml", "--json", "--edit", "5 +1").lines
    assert more[0]["edits"] == ["5 +1"]


def test_a_chat_takes_a_recipe(steer: Steer) -> None:
    steer("recipe", "save", "r.toml", "--edit", "12 +1.5x", "--seed", "3", "--max-tokens", "4", *WITH)
    ran = steer("chat", "--plain", "--recipe", "r.toml", *WITH, stdin="hi\n")
    assert ran.code == 0 and "12 +1.5x: at" in ran.err
    assert steer("chat", "--plain", "--recipe", "none.toml", *WITH, stdin="hi\n").code == 1


def test_the_screens_open_with_a_recipe_once_what_differs_is_said(
    steer: Steer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, Any]] = []

    def run(load: object, settings: object, options: dict[str, Any], log: Path) -> int:
        opened.append(options)
        return 0

    monkeypatch.setitem(sys.modules, "app", SimpleNamespace(run=run))
    monkeypatch.setattr("steer.cli.chat.on_terminal", lambda: True)
    steer("recipe", "save", "r.toml", "--edit", "12 +1.5x", "--seed", "3", "--system", "be kind", *WITH)
    changed_sae(folder, Path("other"))
    ran = steer("chat", "--recipe", "r.toml", "--edit", "5 +1", "--model", "model", "--sae", "other")
    assert ran.code == 0 and "sha256" in ran.err
    [options] = opened
    assert [str(edit) for edit in options["steering"].edits] == ["12 +1.5x", "5 +1"]
    assert (options["seed"], options["system"]) == (3, "be kind")
    assert steer("chat", "--recipe", "r.toml", "--model", "model").code == 1 and len(opened) == 1


def test_a_session_becomes_a_recipe(steer: Steer, folder: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "home" / "sessions")
    session = Session(
        Engine.load(folder / "model", folder / "sae", trust_sae=True), seed=8, max_tokens=3, system="be kind"
    )
    session.steer("12 +2")
    session.steer("clamp 5 0")
    store.save(session, "mine")
    assert steer("recipe", "save", "r.toml", "--session", "mine", "--edit", "7 +1", "--top-k", "5", *WITH).code == 0
    recipe = Recipe.read(Path("r.toml"))
    assert [str(edit) for edit in recipe.steering.edits] == ["12 +2", "clamp 5 0", "7 +1"]
    assert (recipe.seed, recipe.max_tokens, recipe.system, recipe.sampling["top_k"]) == (8, 3, "be kind", 5)
    Path("steer.toml").write_text("temperature = 0.123\nseed = 1\n")
    steer("recipe", "save", "s.toml", "--session", "mine", *WITH)
    again = Recipe.read(Path("s.toml"))
    assert (again.sampling["temperature"], again.seed) == (0.7, 8)


def test_a_recipe_holds_the_length_of_its_replies_and_a_session_without_edits_is_named(
    steer: Steer, folder: Path, tmp_path: Path
) -> None:
    plain = steer("complete", "Once", *SET, "--seed", "3", "--json", *WITH).lines[0]
    steer("recipe", "save", "r.toml", *SET, "--seed", "3", *WITH)
    assert (
        Recipe.read(Path("r.toml")).max_tokens
        and steer("recipe", "apply", "r.toml", "Once", "--json", *WITH).lines[0]["tokens"] == plain["tokens"]
    )
    Store(tmp_path / "home" / "sessions").save(Session(FakeEngine(), seed=8), "none")
    ran = steer("recipe", "save", "s.toml", "--session", "none", *WITH)
    assert ran.code == 1 and "error: session none has no edits" in ran.err and not Path("s.toml").exists()


def test_what_steer_toml_says_elsewhere_does_not_change_a_recipe(steer: Steer) -> None:
    steer("recipe", "save", "r.toml", *SET, "--seed", "3", "--max-tokens", "9", *WITH)
    before = steer("complete", "Once", "--json", "--recipe", "r.toml", *WITH).lines
    Path("steer.toml").write_text("temperature = 5.0\ntop_k = 1\nmin_p = 0.5\nseed = 1\n")
    assert steer("complete", "Once", "--json", "--recipe", "r.toml", *WITH).lines == before


def test_a_recipe_knows_every_sae_in_use(steer: Steer) -> None:
    below = "blocks.0.hook_resid_post"
    save_sae("below", tiny_sae(hook=below))
    both = (*WITH, "--sae", "below")
    assert steer("recipe", "save", "r.toml", "--edit", "12 +2", "--edit", f"5 +1 at {below}", *both).code == 0
    assert [mark.hook for mark in Recipe.read(Path("r.toml")).saes] == [HOOK, below]
    checked = steer("recipe", "check", "r.toml", "--json", *both)
    assert checked.code == 0 and all(line["ok"] for line in checked.lines)
    assert steer("recipe", "check", "r.toml", *WITH).code == 1


def changed_sae(folder: Path, where: Path, **changes: Any) -> None:
    """Another SAE of the same shape, with other maxima."""
    sae = tiny_sae(hook=HOOK, **changes)
    sae.W_dec_FD.mul_(-1)
    assert sae.stats is not None
    stats = Stats(sae.stats.max_F * 2, *(getattr(sae.stats, name) for name in ("mean_on_F", "density_F")), 4.0, 10)
    save_sae(where, sae, stats)


def test_what_differs_is_listed_and_said(steer: Steer, folder: Path) -> None:
    steer("recipe", "save", "r.toml", *SET, "--seed", "3", *WITH)
    same = steer("recipe", "check", "r.toml", "--json", *WITH)
    assert same.code == 0 and all(line["ok"] for line in same.lines) and "as it was made" in same.err
    changed_sae(folder, Path("other"))
    differing = steer("recipe", "check", "r.toml", "--json", "--model", "model", "--sae", "other")
    assert differing.code == 0
    told = {line["check"]: line for line in differing.lines if not line["ok"]}
    assert told.keys() == {
        f"sae at {HOOK} sha256",
        "edit 1 raw",
        "edit 1 max",
        "edit 2 max",
        "edit 2 above",
    }
    assert (told["edit 1 raw"]["then"], told["edit 1 raw"]["now"]) == (3.0, 6.0)
    page = steer("recipe", "check", "r.toml", "--model", "model", "--sae", "other").out
    assert sum(line.startswith("differs ") for line in page.splitlines()) == 5
    ran = steer("complete", "Once", "--recipe", "r.toml", "--max-tokens", "2", "--model", "model", "--sae", "other")
    assert ran.code == 0 and "came to 3" in ran.err and "sha256" in ran.err


def test_another_model_is_noticed(steer: Steer, folder: Path) -> None:
    steer("recipe", "save", "r.toml", "--edit", "12 +2", *WITH)
    write_tiny_checkpoint(Path("tuned"), seed=1)
    told = steer("recipe", "check", "r.toml", "--json", "--model", "tuned", "--sae", "sae").lines
    assert [line["check"] for line in told if not line["ok"]] == ["model sha256"]
    write_tiny_checkpoint(Path("copy"))
    assert model_hash(Path("copy")) == model_hash(folder / "model") != model_hash(Path("tuned"))
    write_tiny_checkpoint(Path("longer"), config=tiny_config(max_context=512))
    assert model_hash(Path("longer")) != model_hash(folder / "model")


@pytest.mark.parametrize(
    ("sae", "why"),
    [
        ({"hook": "blocks.0.hook_resid_post"}, "stands at blocks.0"),
        ({"hook": HOOK, "d_sae": 48}, "d_sae is 48"),
        (None, "no SAE is loaded"),
    ],
)
def test_a_recipe_that_cannot_run_says_why(steer: Steer, sae: dict[str, Any] | None, why: str) -> None:
    steer("recipe", "save", "r.toml", "--edit", "12 +2", *WITH)
    if sae:
        save_sae("other", tiny_sae(**sae))
    here = ("--model", "model", *(("--sae", "other") if sae else ()))
    checked = steer("recipe", "check", "r.toml", *here)
    assert checked.code == 1 and why in checked.out and "cannot run" in checked.err
    ran = steer("complete", "Once", "--recipe", "r.toml", *here)
    assert ran.code == 1 and ran.out == "" and why in ran.err and "hint" in ran.err


def test_an_edit_that_the_engine_refuses_blocks_unless_it_is_muted(steer: Steer) -> None:
    text = 'format = "steer-recipe"\nversion = 1\n[[edit]]\nedit = "99999 +1"\nmuted = {}\n'
    Path("r.toml").write_text(text.format("true"))
    assert steer("recipe", "check", "r.toml", *WITH).code == 0
    assert steer("complete", "Once", "--recipe", "r.toml", "--max-tokens", "1", *WITH).code == 0
    Path("r.toml").write_text(text.format("false"))
    ran = steer("recipe", "check", "r.toml", *WITH)
    assert ran.code == 1 and "99999" in ran.out


def test_a_page_shows_formulas_labels_and_what_it_was_made_with(steer: Steer, folder: Path) -> None:
    steer("recipe", "save", "r.toml", *SET, "--notes", "evil \x1b[31m red", *WITH)
    meta = {"sae/sae.safetensors": file_hash(folder / "sae" / "sae.safetensors"), "hook": HOOK, "d_sae": "64"}
    with LabelIndex.create(Path("labels.db"), meta) as index:
        index.add_label(12, "bri\x1bdges", "me")
    shown = steer("recipe", "show", "r.toml", "--labels", "labels.db", *WITH)
    assert shown.code == 0 and "\x1b" not in shown.out
    for text in ("12 +1.5x", "adds v * d, whatever", "v = 3, the latent's max = 2", "dges", "topk-8", "32", "evil"):
        assert text in shown.out, text
    assert all(len(line) <= 80 for line in shown.out.splitlines())
    [entry] = steer("recipe", "show", "r.toml", "--json", "--labels", "labels.db", *WITH).lines
    assert (entry["edits"][0]["edit"], entry["edits"][0]["raw"]) == ("12 +1.5x", 3.0)
    assert entry["saes"][0]["d_sae"] == 64


def test_a_label_is_kept_where_the_edit_names_the_first_saes_own_hook_point(steer: Steer) -> None:
    with LabelIndex.create(Path("labels.db"), {"d_sae": "64"}) as index:
        index.add_label(12, "bridges", "me")
    places = ("", f" at {HOOK}", " at layers.1", " at L1R")
    edits = [word for place in places for word in ("--edit", f"12 +1{place}")]
    assert steer("recipe", "save", "r.toml", *edits, "--labels", "labels.db", *WITH).code == 0
    assert [line.label for line in Recipe.read(Path("r.toml")).lines] == ["bridges"] * len(places)


def test_an_error_that_is_dropped_needs_its_sae(steer: Steer) -> None:
    edit = ("--edit", "vector vector.npy 2 at blocks.0.hook_resid_post")
    for error, code in (("keep", 0), ("drop", 1)):
        assert steer("recipe", "save", f"{error}.toml", *edit, "--error", error, *WITH).code == 0
        ran = steer("complete", "Once", "--recipe", f"{error}.toml", "--max-tokens", "2", "--model", "model")
        assert ran.code == code and ("cannot run here: no SAE is loaded" in ran.err) == (error == "drop")


def test_labels_of_another_sae_are_not_shown(steer: Steer) -> None:
    steer("recipe", "save", "r.toml", "--edit", "12 +2", *WITH)
    with LabelIndex.create(Path("labels.db"), {"sae/sae.safetensors": "0" * 64}) as index:
        index.add_label(12, "bridges", "me")
    assert "bridges" not in steer("recipe", "show", "r.toml", "--labels", "labels.db").out


def test_files_that_are_there_are_not_replaced_unasked(steer: Steer) -> None:
    save = ("recipe", "save", "r.toml", "--edit", "12 +2", *WITH)
    assert steer(*save).code == 0
    again = steer(*save)
    assert again.code == 1 and "--force" in again.err
    assert steer(*save, "--force").code == 0
    assert steer("recipe", "save", "new/r.toml", "--edit", "12 +2", *WITH).code == 1
    assert "nothing to save" in steer("recipe", "save", "e.toml", *WITH).err
    assert steer("recipe", "save", "e.toml", "--edit", "99999 +2", *WITH).code == 1
    assert not Path("e.toml").exists()


def test_import_and_export_say_what_was_lost(steer: Steer) -> None:
    steer("recipe", "save", "r.toml", "--edit", "12 +1.5x", "--edit", "cap 3 1", *WITH)
    ran = steer("recipe", "export", "r.toml", "v.gguf", *WITH)
    assert ran.code == 0 and "left out: `cap 3 1`" in ran.err and ran.out == ""
    ran = steer("recipe", "import", "v.gguf", "back.toml")
    assert ran.code == 0 and "counted from 0" in ran.err
    [edit] = Recipe.read(Path("back.toml")).steering.edits
    assert Path(edit.file).samefile("v.gguf") and edit.place == "all+special"
    flags = ("--json", "--seed", "1", "--max-tokens", "6", *WITH)
    [ours] = steer("complete", "Once", "--edit", "12 +1.5x on all+special", *flags).lines
    [theirs] = steer("complete", "Once", "--recipe", "back.toml", *flags).lines
    assert ours["tokens"] == theirs["tokens"]
    for bad in ("nan", "inf", "-inf"):
        ran = steer("recipe", "import", "v.gguf", "bad.toml", "--coefficient", bad)
        assert ran.code == 1 and f"a strength of {bad}" in ran.err and not Path("bad.toml").exists()
    Path("cap.json").write_text('{"features": [{"index": 1, "layer": "1-res"}], "steer_method": "PROJECTION_CAP"}')
    none = steer("recipe", "import", "cap.json", "none.toml")
    assert none.code == 1 and "left out: feature 1" in none.err and not Path("none.toml").exists()
    assert steer("recipe", "import", "missing.csv", "none.toml").code == 1
    assert steer("recipe", "export", "r.toml", "x.unknown").code == 1


@pytest.mark.parametrize(
    ("source", "heeded"),
    [
        ("x.csv", {"hook"}),
        ("v.gguf", {"coefficient"}),
        ("https://neuronpedia.org/llama3-8b-it/25-res-jh/18895", {"hook", "strength"}),
        ("g.json", {"hook", "sae-name"}),
    ],
)
def test_what_a_format_does_not_heed_is_refused(steer: Steer, source: str, heeded: set[str]) -> None:
    Path("x.csv").write_text("hookpoint,feature_index,steering_coefficient\nlayers.1,9,2\n")
    Path("g.json").write_text('{"edits": [{"index_in_sae": 5, "value": 0.5}]}')
    steer("recipe", "save", "r.toml", "--edit", "12 +1.5x", *WITH)
    assert steer("recipe", "export", "r.toml", "v.gguf", *WITH).code == 0
    options = {"hook": HOOK, "sae-name": "goodfire:meta-llama/Llama-3.3-70B-Instruct", "strength": "2x"}
    for name, value in (options | {"coefficient": "3"}).items():
        ran = steer("recipe", "import", source, f"{name}.toml", f"--{name}", value)
        if name in heeded:
            assert ran.code == 0, ran.err
        else:
            assert ran.code == 1 and f"--{name} has no meaning for this format" in ran.err
            assert not Path(f"{name}.toml").exists()
    named = steer("recipe", "export", "r.toml", "w.gguf", "--sae-name", "sparsify:a/b", *WITH)
    assert named.code == 1 and "--sae-name has no meaning" in named.err and not Path("w.gguf").exists()


# -- what the formats say, against their own arithmetic in float64 -----------------------------------------------------


def steered(engine: Engine, recipe: Recipe, x_TD: torch.Tensor) -> torch.Tensor:
    """The stream at the hook point after a recipe's edits, as the engine's steerer makes it."""
    from llama_3.hooks import HookPoint, Span
    from sae.intervene import Steerer

    hook = HookPoint.parse(HOOK)
    span = Span(torch.arange(len(x_TD))[None], torch.zeros(1, len(x_TD), dtype=torch.long), (0,), torch.tensor([3]))
    sets = {0: engine.compile(recipe.steering)[hook]}
    return Steerer(engine.saes[hook], engine.tokenizer.special_ids, sets=sets)(x_TD[None], span)[0]


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    sae = load_sae(folder / "sae")
    sae.b_dec_D.copy_(torch.linspace(-2, 1, 32))
    sae.W_dec_FD.mul_(3)
    save_sae(folder / "biased", sae)
    return Engine.load(folder / "model", folder / "biased", trust_sae=True)


def _imported(engine: Engine, file: Path) -> Recipe:
    from steer.recipe_formats import Asked, find_format
    from steer.recipe_formats.decoder import EngineDecoder

    return find_format(None, str(file), "read").read(file, Asked(), lambda: EngineDecoder(engine)).recipe


X_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)) * 4


@pytest.mark.parametrize(("action", "value"), [("add", 7.5), ("clamp", 7.5), ("clamp", -20.0)])
def test_a_row_of_the_harness_does_what_the_harness_does(
    engine: Engine, tmp_path: Path, action: str, value: float
) -> None:
    row = f"sparsify,{action},org/repo,layers.1,9,{value}\n"
    (tmp_path / "r.csv").write_text("loader,action,sparse_model,hookpoint,feature_index,steering_coefficient\n" + row)
    sae, x_TD = engine.sae, X_TD.double()
    assert sae is not None
    d_D, b_D = sae.decoder_direction(9).double(), sae.b_dec_D.double()
    if action == "add":
        expected_TD = x_TD + value * d_D
    else:
        u_D = d_D / d_D.norm()
        y_TD = x_TD - b_D
        expected_TD = y_TD - (y_TD @ u_D)[:, None] * u_D + value * u_D + b_D
    got_TD = steered(engine, _imported(engine, tmp_path / "r.csv"), X_TD)
    torch.testing.assert_close(got_TD.double(), expected_TD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "value"), [("SIMPLE_ADDITIVE", 2.5), ("ORTHOGONAL_DECOMP", 0), ("ORTHOGONAL_DECOMP", -2)]
)
def test_a_preset_does_what_neuronpedia_does(engine: Engine, tmp_path: Path, method: str, value: float) -> None:
    features = [{"modelId": "m", "layer": "1-res", "index": 9, "strength": value / 2}]
    preset = {"features": features, "steer_method": method, "strength_multiplier": 2}
    (tmp_path / "p.json").write_text(json.dumps(preset))
    sae, x_TD = engine.sae, X_TD.double()
    assert sae is not None
    d_D = sae.decoder_direction(9).double()
    along_TD = (x_TD @ d_D)[:, None] * d_D / (d_D @ d_D)
    expected_TD = x_TD + value * d_D if method == "SIMPLE_ADDITIVE" else x_TD - along_TD + value * along_TD
    got_TD = steered(engine, _imported(engine, tmp_path / "p.json"), X_TD)
    torch.testing.assert_close(got_TD.double(), expected_TD, atol=1e-5, rtol=1e-5)


def test_a_csv_of_real_rows_comes_back(engine: Engine, tmp_path: Path) -> None:
    from steer.recipe_formats import Asked, find_format
    from steer.recipe_formats.decoder import EngineDecoder

    texts = ("project 9 on all+special", "9 +4.25 on all+special", "project 10 on all+special")
    recipe = Recipe.of(*(Edit.parse(f"{text} at {HOOK}") for text in texts))
    written = find_format("lm-eval", "", "write").write(recipe, Asked(), lambda: EngineDecoder(engine))
    (tmp_path / "r.csv").write_bytes(written.content)
    assert _imported(engine, tmp_path / "r.csv").steering == recipe.steering

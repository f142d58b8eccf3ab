"""The compiled step gives the tokens of the plain one with hooks at work, and is compiled once, not once a layer."""

import shutil
from collections import Counter

import pytest
import torch
from torch import Tensor

from llama_3.hooks import HookPoint, Hooks, Span
from llama_3.sampling import Sampling
from tests.llama_3.test_generate import run, tokens_of
from tests.tiny import tiny_config, tiny_model

torch.set_num_threads(1)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_steps_give_the_same_tokens_with_hooks_in_the_middle() -> None:
    config = tiny_config(n_layers=4)
    plain, compiled = tiny_model(3, config), tiny_model(3, config)
    compiled.compile_blocks()
    hooks, calls = Hooks(), list[int]()

    def push(x_BTD: Tensor, span: Span) -> Tensor:
        calls.append(x_BTD.shape[1])
        return x_BTD * 1.1

    hooks.add(HookPoint(2, "attn_z"), push)
    before = Counter(torch._dynamo.utils.counters["frames"])
    for prompts, on in (([[256, 1, 2, 3]], None), ([[256, 1, 2, 3]], hooks), ([[256, 1, 2], [256, 5]], hooks)):
        options = dict(sampling=Sampling(0.0), max_tokens=10, hooks=on)
        calls.clear()
        ours = run(compiled, prompts, **options)
        assert calls == ([len(prompts[0])] + [1] * 9 if on else [])
        theirs = run(plain, prompts, **options)
        assert [tokens_of(row) for row in ours] == [tokens_of(row) for row in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            assert [step.logprob for step in mine] == pytest.approx([step.logprob for step in other], rel=1e-4)
    after = torch._dynamo.utils.counters["frames"]
    assert 1 <= after["ok"] - before["ok"] <= 3

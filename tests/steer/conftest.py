"""Most SAEs here have random weights, which fit no model: the first look that refuses to steer with those is off."""

import pytest


@pytest.fixture(autouse=True)
def _trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.analysis.checkup.glance", lambda model, sae, tokenizer: None)

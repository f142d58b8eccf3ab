"""The figures of benchmarks/calibration.py: who is picked, at which strength, and what a mean over topics says."""

from pathlib import Path

import pytest

from benchmarks.calibration import candidates, mean_over, more_first, own_strength, picks, ranks_agree
from labels.index import Calibration, Label, LabelIndex


@pytest.fixture
def index(tmp_path: Path) -> LabelIndex:
    made = LabelIndex.create(tmp_path / "labels.db")
    made.write_features(range(4), [1.0] * 4, [1.0] * 4, [0.1] * 4)
    made.add_labels(
        [Label(latent, text, "a", "") for latent, text in enumerate(("sea", "sea, salt", "a far, far sea"))]
    )
    made.write_calibrations(Calibration(latent, 1.0, None, value, "{}") for latent, value in enumerate((1.0, 0.0, 3.0)))
    return made


def test_the_picks_of_a_topic_are_among_the_same_hits(index: LabelIndex) -> None:
    found = {name: feature.latent for name, feature in picks(index, "sea").items()}
    assert (found["label match"], found["steerability"]) == (0, 2)
    assert picks(index, "moon") == {}


def test_hits_come_before_what_nobody_looked_for(index: LabelIndex) -> None:
    assert candidates(index, {"sea": [], "salt": []})[:3] == [0, 1, 2]
    assert sorted(candidates(index, {"salt": []})) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("sweet", "ratios", "strength"),
    [(0.5, (1.0, 1.0), 0.5), (None, (1.4, 2.0), 0.5), (None, (1.6, 2.0), 0.5), (None, (1.6, 1.2), 1.0)],
)
def test_a_latent_without_a_sweet_spot_is_pushed_as_far_as_one_may(
    sweet: float | None, ratios: tuple[float, ...], strength: float
) -> None:
    trials = [{"strength": at, "ratio": ratio} for at, ratio in zip((0.0, 0.5, 1.0), (1.0, *ratios), strict=True)]
    assert own_strength({"sweet": sweet, "trials": trials}) == strength


def test_means_and_ranks() -> None:
    mean = mean_over([0.0, 1.0] * 50)
    assert mean.value == 0.5 and 0.35 < mean.low < 0.45 and 0.55 < mean.high < 0.65
    assert ranks_agree([1, 2, 3, 4], [2, 4, 6, 9]) == pytest.approx(1)
    assert ranks_agree([1, 2, 2, 3], [3, 2, 2, 1]) == pytest.approx(-1)


def test_a_list_sorted_by_what_it_is_judged_by_comes_out_ahead() -> None:
    hits = [place / 40 for place in range(40)]
    more = more_first(hits, hits, hits[::-1], 10)
    assert more.value == pytest.approx(0.75) and 0.5 < more.low < 0.75 < more.high
    assert more_first(hits, hits, hits, 10).high == 0

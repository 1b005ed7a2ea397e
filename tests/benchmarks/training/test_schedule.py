"""Operations and duration of the paper's training schedule."""

import pytest

from benchmarks.training.schedule import PEAK, page, stages


def test_the_duration_of_the_first_stage_follows_from_its_operations() -> None:
    stage = stages()[0]
    # An independent counter gave 216.3 GFLOP from the shapes of the layers.
    assert stage.flops == pytest.approx(216.5e9, rel=0.003)
    assert stage.images_per_s(0.5) == pytest.approx(8 * PEAK * 0.5 / stage.flops)
    assert stage.days(0.5) == pytest.approx(275_000 * 1600 / stage.images_per_s(0.5) / 86_400)
    row = {"recipe": stage.name, "parameters": 1, "size": 256, "flops": stage.flops, "batch": 1600}
    row |= {"steps": 275_000, "images": 440_000_000, "images_per_s": [1.0] * 3, "days": [1.0, 2.0, 3.0]}
    assert "1.0 days at 30%, 2.0 days at 40%, 3.0 days at 50%" in page([row])

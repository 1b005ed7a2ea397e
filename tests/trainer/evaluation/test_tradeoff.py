"""Style against content: settings, their requests, scores on known features, and the rule for the default."""

import numpy as np
import pytest

from tests.trainer.tiny_run import PROMPTS
from trainer.evaluation.classifier import TrainedClassifier
from trainer.evaluation.intervals import Bootstrap
from trainer.evaluation.paper.charts import tradeoff_chart
from trainer.evaluation.scores import Evaluator, Reference, SampleFeatures
from trainer.evaluation.styles import NO_NEIGHBORS, RETRIEVAL, make_style_groups
from trainer.evaluation.tradeoff import Setting, default_setting, make_settings, setting_groups, tradeoff
from trainer.sampling.recipe import SamplingConfig

STYLES = ("a", "b")
FULL, INNER = (0.0, 1.0), (0.2, 0.8)
COUNT = 6


class ByFirstValues:
    """A judge that takes a feature row for the style with the larger of its first two values."""

    styles = STYLES

    def logits(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, :2]


def samples(style: str, share_right: float, cosine: float) -> SampleFeatures:
    """Samples of which a share is taken for their style, with a cosine to the prompts."""
    label, right = STYLES.index(style), round(share_right * COUNT)
    texts = np.zeros((COUNT, 4), np.float32)
    texts[:, 2] = 1
    pictures = np.zeros((COUNT, 4), np.float32)
    rest = np.sqrt(1 - cosine**2)
    pictures[:, 2] = cosine
    pictures[:right, label] = pictures[right:, 1 - label] = rest
    return SampleFeatures(pictures, texts, tuple(f"prompt {n % 3}" for n in range(COUNT)), np.zeros((COUNT, 1, 1, 3)))


@pytest.fixture(scope="module")
def measured() -> dict:
    """Three settings: all of the style with half of the content, most of both, and one that is worse in both."""
    settings = make_settings([1.0, 3.0], [4], [FULL, INNER])
    known = dict(zip([setting.name for setting in settings], [(1.0, 0.4), (5 / 6, 0.72), (4 / 6, 0.64)], strict=True))
    features = {(name, style): samples(style, *values) for name, values in known.items() for style in STYLES}
    features |= {(NO_NEIGHBORS, style): samples(style, 0.5, 0.8) for style in STYLES}
    judge = TrainedClassifier(ByFirstValues(), 1.0, {}, 1)
    reference = Reference.of({style: np.eye(4, dtype=np.float32) for style in STYLES}, 1)
    return tradeoff(settings, features, Evaluator(judge, None, reference, Bootstrap(200, 0)))


def test_style_and_content_are_those_of_the_samples_with_intervals_by_prompt(measured):
    assert [row["style"][0] for row in measured["settings"]] == pytest.approx([1, 5 / 6, 4 / 6])
    assert [row["content"][0] for row in measured["settings"]] == pytest.approx([0.5, 0.9, 0.8])
    assert [row["on_front"] for row in measured["settings"]] == [True, True, False]
    for row in measured["settings"]:
        assert row["style"][1] < row["style"][0] <= row["style"][2]
        assert row["content"][1] == pytest.approx(row["content"][2])  # all samples have the same content
    assert (measured["samples"], measured["prompts"], measured["judge"]) == (12, 3, "clip")


def test_the_curve_is_drawn(measured):
    assert tradeoff_chart(measured).startswith(b"\x89PNG")


def test_the_default_is_the_setting_with_the_most_content_that_reaches_both_goals(measured):
    def row(style: float, content: float) -> dict:
        return {"style": (style, 0, 1), "content": (content, 0, 2)}

    rows = [row(1.0, 0.9), row(0.96, 0.96), row(0.95, 0.98), row(0.94, 1.0)]
    assert default_setting(rows) == rows[2] | {"reached": True}
    assert default_setting([rows[0], rows[3]]) == rows[3] | {"reached": False}
    assert not measured["default"]["reached"]
    assert measured["default"]["guidance_interval"] == FULL
    assert measured["default"]["guidance"] == 3.0


def test_settings_are_all_combinations_without_those_that_have_no_effect():
    settings = make_settings([1.0, 2.0, 2.0], [1, 8], [FULL, INNER])
    assert settings == [
        *(Setting(1.0, k, FULL) for k in (1, 8)),
        *(Setting(2.0, k, interval) for interval in (FULL, INNER) for k in (1, 8)),
    ]
    weighted = make_settings([2.0], [1], [FULL], [1.0, 0.5])
    assert weighted == [Setting(2.0, 1, FULL, 1.0), Setting(2.0, 1, FULL, 0.5)]
    assert len({setting.name for setting in [*settings, *weighted]}) == 7


def test_a_setting_changes_only_guidance_interval_and_neighbors_of_the_first_samples():
    retrieved = [group for group in make_style_groups(SamplingConfig(), 3, STYLES, PROMPTS) if group.mode == RETRIEVAL]
    first, second = setting_groups(retrieved, [Setting(2.0, 3, INNER, 0.5)], 2)
    assert (first.name, first.style, second.style) == ("tradeoff/guidance-2-k-3-from-0.2-to-0.8-weight-0.5/a", "a", "b")
    assert first.prompts == retrieved[0].prompts[:2]
    for request, original in zip(first.requests, retrieved[0].requests[:2], strict=True):
        assert (request.guidance, request.k, request.guidance_interval) == (2.0, 3, INNER)
        assert request.neighbor_weight == 0.5
        assert (request.prompt, request.seed, request.database) == (original.prompt, original.seed, "a")

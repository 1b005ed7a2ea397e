"""The judge of contents: labels, shares, what the network learns, and the links of a tiny demo."""

from collections import Counter
from dataclasses import replace

import numpy as np
import torch

from jobs.demo.judge.labels import CLASSES, equal, labels_of, shares
from jobs.demo.judge.links import LINKS, variants
from jobs.demo.judge.network import draw_scenes, fit
from jobs.demo.recipe import JudgeTraining
from jobs.demo.world.content import Content, Scene
from jobs.demo.world.scenes import COLORS, is_held_out
from jobs.demo.world.training_scenes import draw_training_scenes
from retrieval import Root
from retrieval.storage.manifest import read_manifest
from tests.jobs.demo.tiny_demo import TinyDemo

PAIR = Scene(Content("star", "blue", "sea", 2, "stacked"), "chalk", 0)
SINGLE = Scene(Content("star", "red", "sea", 1, ""), "mosaic", 0)


def test_labels_are_the_numbers_of_the_true_values() -> None:
    labels = labels_of([PAIR, SINGLE])
    assert {name: [CLASSES[name][i] for i in numbers] for name, numbers in labels.items()} == {
        "shape": ["star", "star"],
        "count": [2, 1],
        "color": ["blue", "red"],
        "background": ["sea", "sea"],
        "layout": ["stacked", ""],
        "style": ["chalk", "mosaic"],
    }


def test_layout_counts_only_pictures_with_several_figures() -> None:
    wanted = labels_of([PAIR, PAIR, SINGLE, SINGLE])
    predicted = labels_of([PAIR, SINGLE, SINGLE, SINGLE])
    result = shares(equal(predicted, wanted), wanted)
    assert {name: estimate.value for name, estimate in result.items()} == {
        **{"shape": 1, "count": 0.75, "color": 0.75, "background": 1, "layout": 0.5, "style": 0.75}
    }
    assert "layout" not in shares(equal(wanted, wanted), labels_of([SINGLE] * 4))


def test_pictures_of_one_content_count_as_one_in_intervals_also_in_several_styles() -> None:
    other = replace(PAIR, content=replace(PAIR.content, shape="heart"))
    flags = {"color": np.array([True] * 4 + [False] * 4)}
    same = shares(flags, labels_of([PAIR, replace(PAIR, style="mosaic")] * 2 + [other] * 4))["color"]
    colors = [replace(PAIR, content=replace(PAIR.content, color=color)) for color in COLORS[:8]]
    different = shares(flags, labels_of(colors))["color"]
    assert same.value == different.value == 0.5
    assert same.high - same.low > 1.3 * (different.high - different.low)


def test_captions_of_another_value_differ_only_in_that_attribute() -> None:
    for name, classes in CLASSES.items():
        scenes = variants(PAIR, name)
        assert PAIR in scenes
        if name in ("count", "layout"):
            assert len(scenes) == 5
            assert all((scene.content.layout == "") == (scene.content.count == 1) for scene in scenes)
        else:
            assert len(scenes) == len(classes)
            changed = [other for other in CLASSES if len(set(labels_of(scenes)[other])) > 1]
            assert changed == [name]


def test_the_judge_learns_colors_and_styles_in_a_few_steps() -> None:
    config = JudgeTraining(steps=60, batch_size=32, num_threads=1)
    scenes, pixels = draw_training_scenes(160, 64, seed=5, num_workers=1)
    judge = fit(torch.from_numpy(pixels), labels_of(scenes), config)
    others, other_pixels = draw_training_scenes(100, 64, seed=6, num_workers=1)
    predicted = judge.predict(np.ascontiguousarray(other_pixels.transpose(0, 2, 3, 1)))
    accuracy = {name: float(np.mean(correct)) for name, correct in equal(predicted, labels_of(others)).items()}
    assert min(accuracy["color"], accuracy["style"]) > 0.6
    assert min(accuracy["count"], accuracy["background"], accuracy["layout"]) > 0.6  # shapes need more steps


def test_the_scenes_of_the_judge_are_those_of_no_other_model_with_the_same_seed() -> None:
    config = JudgeTraining(num_scenes=8, num_threads=1)
    own, _ = draw_scenes(config, world_seed=3)
    others, _ = draw_training_scenes(8, 64, config.seed, num_workers=1, every_content=True)
    of_another_world, _ = draw_scenes(config, world_seed=4)
    seeds = [{scene.seed for scene in scenes} for scenes in (own, others, of_another_world)]
    assert len(set.union(*seeds)) == 3 * 8
    assert draw_scenes(config, world_seed=3)[0] == own


def test_only_the_judge_draws_held_out_contents() -> None:
    scenes, _ = draw_training_scenes(60, 64, seed=5, num_workers=1, every_content=True)
    held_out = Counter(is_held_out(scene.content) for scene in scenes)
    assert 1 <= held_out[True] <= 20


def test_the_links_of_a_demo_are_complete_and_neighbors_of_a_style_have_it(tiny_demo: TinyDemo) -> None:
    links = read_manifest(Root(tiny_demo.root), "judge").values["links"]
    assert set(links) == set(LINKS)
    for name, link in links.items():
        assert set(link) == set(CLASSES) - ({"style"} if name == "samples_no_neighbors" else set())
        assert all(0 <= low <= value <= high <= 1 for value, low, high in link.values())
    assert links["style_neighbors"]["style"][0] == 1
    assert 0 < links["style_neighbors"]["shape"][0] < 1
    assert 0 < links["training_neighbors"]["style"][0] <= 1

"""Styles without a name: what decides their pictures, which rows have them, and that no caption names one."""

from dataclasses import replace

import numpy as np

from jobs.demo.judge.labels import equal, labels_of
from jobs.demo.world.metadata import Site, ordinary_row
from jobs.demo.world.scenes import caption, draw, random_scene
from jobs.demo.world.styles import STYLES, UNKNOWN_STYLES
from jobs.demo.world.varied_styles import NUM_VARIED_STYLES, is_varied, varied_number, varied_style

NUMBERS = range(NUM_VARIED_STYLES)


def test_a_number_decides_the_style_and_other_numbers_give_other_pictures():
    scene = random_scene(np.random.default_rng(1))
    pictures = [draw(replace(scene, style=varied_style(number)), 64, 64) for number in (*NUMBERS, 3)]
    np.testing.assert_array_equal(pictures[3], pictures[-1])
    flat = np.stack(pictures[:-1]).reshape(NUM_VARIED_STYLES, -1).astype(np.float32)
    differences = np.abs(flat[:, None] - flat).mean(axis=2)
    np.fill_diagonal(differences, np.inf)
    assert differences.min() > 4


def test_labels_of_styles_are_told_apart():
    assert [varied_number(varied_style(number)) for number in NUMBERS] == list(NUMBERS)
    assert not any(is_varied(style) for style in (*STYLES, *UNKNOWN_STYLES))
    scene = random_scene(np.random.default_rng(1))
    labels = labels_of([replace(scene, style=style) for style in (*STYLES, *map(varied_style, NUMBERS))])
    assert labels["style"].tolist() == list(range(len(STYLES) + NUM_VARIED_STYLES))
    assert equal(labels, labels)["style"].all()


def test_captions_name_no_style_without_a_name():
    rng = np.random.default_rng(0)
    texts = [caption(replace(random_scene(rng), style=varied_style(number)), rng) for number in NUMBERS]
    assert not any("varied" in text or "style" in text for text in texts)


def test_a_share_of_the_rows_has_such_styles_and_the_others_stay_as_they_are():
    plain, varied = Site("http://127.0.0.1:1", 0), Site("http://127.0.0.1:1", 0, varied_share=0.5)
    pairs = [[ordinary_row(site, uid, large=False) for site in (plain, varied)] for uid in range(200)]
    changed = [(before, after) for before, after in pairs if is_varied(after.scene.style)]
    assert 70 < len(changed) < 130
    assert len({after.scene.style for _, after in changed}) > 50
    for before, after in changed:
        assert (before.scene.content, before.scene.seed) == (after.scene.content, after.scene.seed)
    assert all(before == after for before, after in pairs if not is_varied(after.scene.style))

"""Scenes: reproducible, with correct captions and held-out contents, and alike at every size."""

import numpy as np
import pytest
from open_clip import SimpleTokenizer
from PIL import Image

from jobs.demo.models.clip import MODEL
from jobs.demo.world import scenes
from jobs.demo.world.content import Content, Scene
from jobs.demo.world.scenes import draw
from jobs.demo.world.styles import STYLES, UNKNOWN_STYLES
from retrieval.errors import UserError

ALL_STYLES = (*STYLES, *UNKNOWN_STYLES)


def scene_of(style: str, seed: int) -> Scene:
    return scenes.random_scene(np.random.default_rng(seed), style=style)


def mean_difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(np.float32) - second.astype(np.float32)).mean())


def reduced(pixels: np.ndarray, factor: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).reduce(factor))


def test_there_are_ten_styles_and_1600_contents_in_order():
    contents = scenes.all_contents()
    assert len(scenes.STYLES) == len(set(scenes.STYLES)) == 10
    assert len(contents) == len(set(contents)) == 8 * 8 * 5 * (1 + 2 + 2)
    assert contents == sorted(contents)


def test_a_tenth_of_the_contents_is_held_out_by_seed():
    held = [content for content in scenes.all_contents() if scenes.is_held_out(content)]
    others = [content for content in scenes.all_contents() if scenes.is_held_out(content, 1)]
    assert 120 < len(held) < 200
    assert len(set(held) & set(others)) < 40


@pytest.mark.parametrize("held_out", [False, True])
def test_a_random_scene_is_held_out_only_on_request(held_out):
    rng = np.random.default_rng(0)
    assert all(scenes.is_held_out(scenes.random_scene(rng, held_out).content) == held_out for _ in range(100))


def test_the_same_generator_state_gives_the_same_scene():
    assert scene_of("neon", 5) == scene_of("neon", 5)
    assert scene_of("neon", 5) != scene_of("neon", 6)


@pytest.mark.parametrize("style", ALL_STYLES)
def test_a_picture_depends_only_on_the_scene(style):
    scene = scene_of(style, 1)
    pixels = draw(scene, 96, 64)
    assert pixels.shape == (64, 96, 3)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, draw(scene, 96, 64))
    assert not np.array_equal(pixels, draw(Scene(scene.content, style, scene.seed + 1), 96, 64))


@pytest.mark.parametrize("style", ALL_STYLES)
def test_a_scene_looks_the_same_at_every_size(style):
    for seed in range(3):
        small, large = (draw(scene_of(style, seed), side, side) for side in (64, 512))
        other_scene = draw(scene_of(style, seed + 10), 64, 64)
        assert mean_difference(small, reduced(large, 8)) < 0.25 * mean_difference(small, other_scene)


def test_the_middle_of_a_wide_picture_is_the_square_picture():
    scene = scene_of("woodcut", 2)
    wide, square = draw(scene, 192, 128), draw(scene, 128, 128)
    assert mean_difference(wide[:, 32:-32], square) < 8


@pytest.mark.parametrize("size", [(63, 64), (64, 300)])
def test_an_unsupported_size_is_an_error(size):
    with pytest.raises(UserError, match="64 px"):
        draw(scene_of("chalk", 0), *size)


def test_every_pair_of_styles_paints_the_same_content_differently():
    content = scenes.all_contents()[0]
    pictures = [draw(Scene(content, style, 3), 64, 64) for style in ALL_STYLES]
    for i, picture in enumerate(pictures):
        assert all(mean_difference(picture, other) > 15 for other in pictures[:i])


@pytest.mark.parametrize("style", ALL_STYLES)
def test_every_style_keeps_the_color_of_the_figure(style):
    red, blue = (
        draw(Scene(Content("circle", color, "hills", 1, ""), style, 4), 64, 64).astype(np.float32)
        for color in ("red", "blue")
    )
    difference = (red - blue)[16:48, 16:48].mean(axis=(0, 1))
    assert difference[0] > 4
    assert difference[2] < -4


def test_the_full_caption_has_all_properties():
    scene = Scene(Content("star", "orange", "sea", 2, "stacked"), "stained glass", 0)
    assert scenes.full_caption(scene) == ("two orange stars stacked over the sea in the style of stained glass")
    assert scenes.prompt(Content("star", "orange", "sea", 1, "")) == "an orange star over the sea"


def test_full_captions_of_different_content_or_style_differ():
    captions = {scenes.suffix_prompt(content, style) for content in scenes.all_contents() for style in scenes.STYLES}
    assert len(captions) == 16_000


def test_the_suffix_prompt_only_adds_the_style():
    content = scenes.all_contents()[7]
    assert not any(style in scenes.prompt(content) for style in scenes.STYLES)
    assert scenes.suffix_prompt(content, "neon") == scenes.prompt(content) + " in the style of neon"


def test_held_out_prompts_differ_and_repeat_a_content_only_after_all():
    held_out = [content for content in scenes.all_contents() if scenes.is_held_out(content)]
    first = scenes.held_out_prompts(len(held_out))
    assert first == sorted(scenes.prompt(content) for content in held_out)
    others = set(scenes.held_out_prompts(200)) - set(first)
    assert len(others) == 200 - len(held_out)
    assert others < {scenes.prompt(content, 1) for content in held_out}
    with pytest.raises(UserError, match="495 exist, 496 were asked for"):
        scenes.held_out_prompts(496)


def test_the_text_encoder_reads_the_style_after_every_prompt():
    tokenize = SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])
    prompts = [f"{prompt} in the style of {style}" for prompt in scenes.held_out_prompts(495) for style in ALL_STYLES]
    assert max(len(tokenize.encode(prompt)) for prompt in prompts) <= tokenize.context_length - 2  # start and end


def test_no_prompt_word_knows_an_unknown_style():
    words = {
        word
        for content in scenes.all_contents()
        for phrasing in range(3)
        for word in scenes.prompt(content, phrasing).split()
    }
    words |= {word for style in STYLES for word in style.split()}
    assert not words & {word for style in UNKNOWN_STYLES for word in style.split()}


def test_captions_vary_and_four_in_ten_omit_a_property():
    scene = Scene(Content("moon", "pink", "city", 3, "in a row"), "pixel art", 0)
    rng = np.random.default_rng(0)
    captions = [scenes.caption(scene, rng) for _ in range(1000)]
    complete = [text for text in captions if all(word in text for word in ("pixel art", "city", "in a row"))]
    assert 0.54 < len(complete) / 1000 < 0.66
    assert len(set(captions)) > 20
    assert all("three pink moons" in text for text in captions)


def test_a_paper_shadow_does_not_wrap_around_the_edge():
    content = Content("square", "yellow", "hills", 1, "")
    pixels = draw(Scene(content, "paper cutout", 1), 128, 128).astype(np.float32)
    assert abs(pixels[:2].mean() - pixels[4:8].mean()) < 4

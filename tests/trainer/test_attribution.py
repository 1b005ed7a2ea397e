"""Leave-one-group-out attribution on a tiny model with a real database."""

import numpy as np
import pytest

from retrieval.database.database import Database
from retrieval.errors import UserError
from tests.trainer.tiny_run import write_run
from trainer.attribution import attribute
from trainer.sampling.recipe import ComputeConfig
from trainer.sampling.request import Request
from trainer.sampling.sampler import Sampler

REQUEST = Request(prompt="a circle", database="index", k=4, guidance=2.0, steps=2, seed=3)
STYLES = ("deep_red", "green", "sky_blue")


@pytest.fixture(scope="module")
def sampler(tmp_path_factory) -> Sampler:
    return Sampler.open(*write_run(tmp_path_factory.mktemp("attribution")), ComputeConfig(device="cpu", workers=1))


def pixels(sample) -> np.ndarray:
    return np.asarray(sample.picture).astype(int)


def of_style(style: str) -> str:
    return f"'caption of {style}' in caption"


def test_a_group_that_is_not_among_the_neighbors_gives_the_same_picture_to_the_bit(sampler):
    (drawn,) = sampler.sample([REQUEST])
    absent = next(style for style in STYLES if not any(style in each.url for each in drawn.neighbors))
    result = attribute(sampler, REQUEST, of_style(absent))
    again = sampler.sample([result.without.request])
    assert np.array_equal(pixels(again[0]), pixels(drawn))
    assert np.array_equal(pixels(result.without), pixels(drawn))
    assert (result.removed, result.added, result.pixel_difference) == ((), (), 0.0)
    assert result.clip_similarity == pytest.approx(1)


def test_without_its_neighbors_a_picture_has_the_next_best_and_changes(sampler):
    (drawn,) = sampler.sample([REQUEST])
    best = drawn.neighbors[0]
    style = next(style for style in STYLES if style in best.url)
    result = attribute(sampler, REQUEST, of_style(style))
    assert result.removed == tuple(each for each in drawn.neighbors if style in each.url)
    assert not any(style in each.url for each in result.without.neighbors)
    assert len(result.added) == len(result.removed)
    assert len(result.without.neighbors) == 4
    assert result.pixel_difference == pytest.approx(np.abs(pixels(drawn) - pixels(result.without)).mean())
    assert result.pixel_difference > 0
    assert result.clip_similarity < 1
    one = attribute(sampler, REQUEST, f"image_id in [{best.image_id}]")
    assert (one.removed, len(one.added)) == ((best,), 1)


def test_the_recipe_of_the_picture_without_a_group_reproduces_it(sampler):
    first = attribute(sampler, REQUEST, of_style("green"))
    recipe = first.without.recipe()
    assert recipe["without"] == of_style("green")
    assert "without" not in first.sample.recipe()
    (again,) = sampler.sample([Request.from_recipe(recipe)])
    assert np.array_equal(pixels(again), pixels(first.without))
    second = attribute(sampler, first.without.request, of_style("deep_red"))
    assert all("sky_blue" in each.url for each in second.without.neighbors)


def test_without_a_neighbor_of_the_group_an_approximate_index_is_not_searched_again(sampler, monkeypatch):
    search, conditions = Database.search, []

    def recorded(database, *args, **options):
        conditions.append(database.condition)
        return search(database, *args, **options)

    monkeypatch.setattr(Database, "search", recorded)
    attribute(sampler, REQUEST, "norm < 0")
    assert conditions == [None]
    attribute(sampler, REQUEST, "norm > 0")
    assert conditions[1] is None
    assert conditions[2] is not None


def test_conditions_are_combined_also_if_they_end_in_a_comment_and_an_equal_one_is_kept(sampler):
    red, green = f"{of_style('deep_red')} # red", f"{of_style('green')} # green"
    first = attribute(sampler, REQUEST, red)
    second = attribute(sampler, first.without.request, green)
    assert all("sky_blue" in each.url for each in second.without.neighbors)
    same = attribute(sampler, first.without.request, red)
    assert same.without.request.without == red
    assert (same.removed, same.pixel_difference) == ((), 0.0)


def test_rows_with_a_missing_value_are_not_in_the_group(sampler):
    result = attribute(sampler, REQUEST, "license == 'cc0'")
    assert result.without.neighbors == result.sample.neighbors


def test_without_all_rows_the_text_alone_conditions_the_picture(sampler):
    result = attribute(sampler, REQUEST, "width >= 1")
    (text,) = sampler.sample([Request(prompt="a circle", mode="text", guidance=2.0, steps=2, seed=3)])
    assert result.without.neighbors == ()
    assert np.array_equal(pixels(result.without), pixels(text))


def test_a_group_that_cannot_be_left_out_is_refused(sampler):
    for group, message in (("", "invalid syntax"), ("width", "no comparison"), ("height_m > 1", "The columns are")):
        with pytest.raises(UserError, match=message):
            attribute(sampler, REQUEST, group)
    with pytest.raises(UserError, match="no effect in mode 'text'"):
        attribute(sampler, Request(prompt="a", mode="text"), "width > 1")

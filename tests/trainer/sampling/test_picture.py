"""Pictures with their recipe, and labelled grids."""

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from retrieval.errors import UserError
from tests.retrieval.provenance.hostile_pictures import png_of_too_many_pixels, png_with_a_text_bomb
from trainer.sampling.picture import EMPTY_CELL, RECIPE, Grid, draw_grid, fit, png_bytes, read_recipe, to_pictures, wrap
from trainer.sampling.picture import _font as font


def test_a_recipe_with_any_unicode_is_read_back_from_the_png():
    recipe = {"prompt": '鹿 im Wald \x00 "quoted" 🦌\n', "seed": 2**63 - 1, "neighbors": [[-5, 0.25]]}
    png = png_bytes(Image.new("RGB", (4, 3), (1, 2, 3)), recipe)
    assert read_recipe(png) == recipe
    assert png == png_bytes(Image.new("RGB", (4, 3), (1, 2, 3)), recipe)


def test_a_picture_without_a_recipe_is_refused():
    import io

    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    with pytest.raises(UserError, match="no recipe"):
        read_recipe(buffer.getvalue())


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (png_of_too_many_pixels(), "more pixels than Pillow allows"),
        (png_with_a_text_bomb(), "damaged"),
        (b"GIF89a", "no known picture format"),
    ],
)
def test_a_file_that_pillow_refuses_is_refused_with_a_sentence(file, message):
    with pytest.raises(UserError, match=message):
        read_recipe(file)


@pytest.mark.parametrize(("text", "message"), [("[1, 2]", "no recipe"), ("{", "not JSON"), ("[" * 10**5, "not JSON")])
def test_a_text_that_is_no_recipe_is_refused(text, message):
    import io

    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text(RECIPE, text)
    Image.new("RGB", (2, 2)).save(buffer, "PNG", pnginfo=info)
    with pytest.raises(UserError, match=message):
        read_recipe(buffer.getvalue())


def test_decoded_pixels_become_eight_bit_colors_and_are_clipped():
    pixels = np.zeros((1, 3, 2, 2), np.float32)
    pixels[0, 0], pixels[0, 1], pixels[0, 2] = -1.5, 0.0, 1.0
    (picture,) = to_pictures(pixels)
    assert picture.getpixel((0, 0)) == (0, 128, 255)


def test_small_pictures_are_enlarged_by_whole_factors_and_large_ones_shrunk_to_fit():
    assert fit(Image.new("RGB", (64, 64)), 160).size == (128, 128)
    assert fit(Image.new("RGB", (768, 384)), 160).size == (160, 80)


def test_a_grid_shows_every_picture_in_its_own_cell():
    red, blue = Image.new("RGB", (80, 80), (255, 0, 0)), Image.new("RGB", (80, 80), (0, 0, 255))
    sheet = draw_grid(Grid([[red, blue], [None, red]], ["first", "second"], ["a", "b"], "Title", cell=80))
    colors = {color for _, color in sheet.getcolors(1 << 16)}
    assert {(255, 0, 0), (0, 0, 255), EMPTY_CELL} <= colors
    pixels = np.asarray(sheet)
    assert (pixels == [255, 0, 0]).all(-1).sum() == 2 * 80 * 80
    assert (pixels == [0, 0, 255]).all(-1).sum() == 80 * 80
    rows, columns = np.nonzero((pixels == [0, 0, 255]).all(-1))
    reds = np.argwhere((pixels == [255, 0, 0]).all(-1))
    assert reds[:, 1].min() < columns.min(), "red is left of blue in the first row"
    assert reds[:, 0].max() > rows.max(), "and below it in the second"


def test_a_long_label_is_wrapped_and_makes_its_row_taller():
    def height(label: str) -> int:
        return draw_grid(Grid([[Image.new("RGB", (8, 8))]], [label], ["x"], cell=64)).height

    assert height("a prompt of a great many words " * 6) > height("a prompt")


def test_wrapped_lines_fit_and_keep_all_letters():
    text = "donaudampfschifffahrtsgesellschaft and a few words more"
    lines = wrap(text, 80, font(13))
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font(13).getlength(line) <= 80 for line in lines)

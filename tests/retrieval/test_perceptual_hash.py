"""Looks in 64 bits: what a copy keeps, and that near ones are found as comparing all with all finds them."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from retrieval.perceptual_hash import MIRRORED, NONE, Looks, bits_apart, phash


def picture(seed: int) -> Image.Image:
    """Soft blotches of color, as photographs have."""
    blotches = np.random.default_rng(seed).integers(0, 255, (9, 7, 3), np.uint8)
    return Image.fromarray(blotches).resize((300, 400), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def apart(one: Image.Image, other: Image.Image, turned: int = 0) -> int:
    one_hash, other_hash = (np.array([phash(image)]).view(np.uint64) for image in (one, other))
    return int(bits_apart(one_hash, other_hash ^ np.uint64(turned))[0, 0])


@pytest.mark.parametrize("seed", range(5))
def test_scaled_recompressed_and_mirrored_copies_differ_in_few_bits_and_others_in_many(seed: int) -> None:
    image = picture(seed)
    assert apart(image, image.resize((90, 120), Image.Resampling.LANCZOS)) <= 4
    assert apart(image, encoded(image, 30)) <= 4
    assert apart(image, ImageOps.mirror(image), int(MIRRORED)) <= 4
    assert apart(image, ImageOps.mirror(image)) > 20
    assert apart(image, picture(seed + 100)) > 12


def test_a_picture_of_nothing_is_near_no_other() -> None:
    blank = phash(encoded(Image.new("RGB", (300, 200), (17, 90, 160)), 80))
    assert blank == NONE
    assert not Looks(np.array([NONE])).have(np.array([NONE, 1]), 7).any()


@pytest.mark.parametrize("bits", [0, 3, 6, 7])
def test_near_hashes_and_mirrors_are_found_as_by_comparing_all(bits: int) -> None:
    random = np.random.default_rng(bits)
    known = random.integers(1, 1 << 63, 3000)
    asked = random.integers(1, 1 << 63, 2000)
    for row in range(1500):
        flips = np.bitwise_or.reduce(np.uint64(1) << random.permutation(64)[: row % 10].astype(np.uint64))
        turned = MIRRORED if row % 3 == 0 else np.uint64(0)
        asked[row] = (known[row : row + 1].view(np.uint64) ^ flips ^ turned).view(np.int64)[0]
    mine, theirs = known.view(np.uint64), asked.view(np.uint64)
    wanted = [(bits_apart(theirs ^ turned, mine) <= bits).any(axis=1) for turned in (np.uint64(0), MIRRORED)]
    found = Looks(known).have(asked, bits)
    np.testing.assert_array_equal(found, wanted[0] | wanted[1])
    assert 0 < found.sum() < 2000

"""Copies keep most bits of a perceptual hash, and the index finds what a comparison of all pairs finds."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from retrieval.perceptual_hash import BLANK_HASH, MIRROR_MASK, PerceptualHashIndex, hamming_distance, perceptual_hash


def picture(seed: int) -> Image.Image:
    """Soft blotches of color, as photographs have."""
    blotches = np.random.default_rng(seed).integers(0, 255, (9, 7, 3), np.uint8)
    return Image.fromarray(blotches).resize((300, 400), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def distance(image: Image.Image, other: Image.Image, mask: int = 0) -> int:
    hash_, other_hash = (np.array([perceptual_hash(each)]).view(np.uint64) for each in (image, other))
    return int(hamming_distance(hash_, other_hash ^ np.uint64(mask))[0, 0])


@pytest.mark.parametrize("seed", range(5))
def test_scaled_recompressed_and_mirrored_copies_differ_in_few_bits_and_others_in_many(seed: int) -> None:
    image = picture(seed)
    assert distance(image, image.resize((90, 120), Image.Resampling.LANCZOS)) <= 4
    assert distance(image, encoded(image, 30)) <= 4
    assert distance(image, ImageOps.mirror(image), int(MIRROR_MASK)) <= 4
    assert distance(image, ImageOps.mirror(image)) > 20
    assert distance(image, picture(seed + 100)) > 12


def test_a_blank_picture_matches_no_other() -> None:
    blank = perceptual_hash(encoded(Image.new("RGB", (300, 200), (17, 90, 160)), 80))
    assert blank == BLANK_HASH
    assert not PerceptualHashIndex(np.array([blank])).contains_near(np.array([blank, 1]), 7).any()


@pytest.mark.parametrize("max_distance", [0, 3, 6, 7])
def test_near_hashes_and_mirrors_are_those_of_a_comparison_of_all_pairs(max_distance: int) -> None:
    random = np.random.default_rng(max_distance)
    indexed = random.integers(1, 1 << 63, 3000)
    queries = random.integers(1, 1 << 63, 2000)
    masks = (np.uint64(0), MIRROR_MASK)
    for row in range(1500):
        flips = np.bitwise_or.reduce(np.uint64(1) << random.permutation(64)[: row % 10].astype(np.uint64))
        copy = indexed[row : row + 1].view(np.uint64) ^ flips ^ masks[row % 3 == 0]
        queries[row] = copy.view(np.int64)[0]
    distances = [hamming_distance(queries.view(np.uint64) ^ mask, indexed.view(np.uint64)) for mask in masks]
    expected = (np.minimum(*distances) <= max_distance).any(axis=1)
    matches = PerceptualHashIndex(indexed).contains_near(queries, max_distance)
    np.testing.assert_array_equal(matches, expected)
    assert 0 < matches.sum() < 2000

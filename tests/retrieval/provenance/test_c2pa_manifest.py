"""A signed picture names its neighbors, any reader of C2PA accepts it, and every change is detected."""

import io
import json
from pathlib import Path

import c2pa
import pytest
from PIL import Image

from retrieval import UserError
from retrieval.provenance import (
    Credentials,
    Provenance,
    demo_credentials,
    read_credentials,
    read_signature,
    sign_picture,
)
from retrieval.provenance.c2pa_manifest import signed_picture
from tests.retrieval.provenance.hostile_pictures import png_of_too_many_pixels, png_with_a_text_bomb

NEIGHBORS = (
    {"image_id": -(1 << 62) - 1, "similarity": 0.875, "database": "neon", "url": "https://example.org/a.jpg"}
    | {"caption": "a ring", "license": "CC BY 4.0", "creator": "A. Painter"},
    {"image_id": 7, "similarity": 0.5, "database": "neon", "url": "", "caption": "", "license": None},
)
PROVENANCE = Provenance("two rings", {"model": "0123abcd", "databases": {"neon": "89ef"}}, NEIGHBORS)


@pytest.fixture(scope="module")
def credentials() -> Credentials:
    return demo_credentials()


def picture(format_: str = "PNG", color: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), (color, 10, 200)).save(buffer, format_)
    return buffer.getvalue()


@pytest.mark.parametrize("format_", ["PNG", "JPEG"])
def test_a_signed_picture_has_the_same_pixels_and_names_its_neighbors(credentials: Credentials, format_: str) -> None:
    signed = sign_picture(picture(format_), PROVENANCE, credentials)
    with Image.open(io.BytesIO(signed)) as image, Image.open(io.BytesIO(picture(format_))) as before:
        assert image.tobytes() == before.tobytes()
    read = read_signature(signed)
    assert read is not None
    assert (read.is_valid, read.is_trusted, read.problems) == (True, False, ("signingCredential.untrusted",))
    assert "no authority confirms it" in read.signer
    assert read.digests == {"model": "0123abcd", "databases": {"neon": "89ef"}}
    assert [each["image_id"] for each in read.neighbors] == [each["image_id"] for each in NEIGHBORS]
    assert read.neighbors[0] == NEIGHBORS[0]
    assert len(signed) - len(picture(format_)) < 8_000


def test_a_reader_of_c2pa_finds_a_generated_picture_with_inputs(credentials: Credentials) -> None:
    signed = sign_picture(picture(), PROVENANCE, credentials)
    store = json.loads(c2pa.Reader("image/png", io.BytesIO(signed)).json())
    manifest = store["manifests"][store["active_manifest"]]
    assert store["validation_state"] == "Valid"
    assert {each["relationship"] for each in manifest["ingredients"]} == {"inputTo"}
    [action] = manifest["assertions"][0]["data"]["actions"]
    assert action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert len(action["parameters"]["ingredients"]) == 2


def test_the_certificate_of_a_known_authority_is_trusted(credentials: Credentials) -> None:
    signed = sign_picture(picture(), PROVENANCE, credentials)
    authority = b"-----BEGIN" + credentials.certificates.split(b"-----BEGIN")[-1]
    other = b"-----BEGIN" + demo_credentials().certificates.split(b"-----BEGIN")[-1]
    trusted, untrusted = read_signature(signed, authority), read_signature(signed, other)
    assert trusted is not None
    assert (trusted.is_trusted, trusted.problems) == (True, ())
    assert untrusted is not None
    assert not untrusted.is_trusted


def test_every_changed_byte_of_the_pixels_and_a_moved_manifest_are_detected(credentials: Credentials) -> None:
    signed = sign_picture(picture(), PROVENANCE, credentials)
    start = signed.index(b"IDAT")
    for position in range(start + 4, signed.index(b"IEND") - 4, 7):
        changed = bytearray(signed)
        changed[position] ^= 1
        read = read_signature(bytes(changed))
        assert read is not None
        assert not read.is_valid
        assert "assertion.dataHash.mismatch" in read.problems
    with pytest.raises(UserError, match="wanted a PNG or JPEG picture"):
        read_signature(signed[: len(signed) // 2])
    manifest = signed[signed.index(b"caBX") - 4 : start - 4]
    other = picture(color=91)
    moved = read_signature(other[:33] + manifest + other[33:])
    assert moved is not None
    assert not moved.is_valid


def test_statements_of_other_generators_are_read_as_far_as_they_have_our_form() -> None:
    manifest = {
        "claim_generator_info": [],
        "assertions": [{"label": "laion-rdm.digests", "data": [1, 2]}],
        "ingredients": [{"relationship": "inputTo", "metadata": {"image_id": "9" * 400}}, {"relationship": "parentOf"}],
    }
    read = signed_picture({"manifests": {"a": manifest}, "active_manifest": "a", "validation_state": "Invalid"})
    assert (read.is_valid, read.generator, read.digests, read.neighbors) == (False, "?", {}, ())


def test_pictures_without_manifest_have_none_and_other_files_are_refused(credentials: Credentials) -> None:
    assert read_signature(picture()) is None
    for file in (b"junk", png_of_too_many_pixels(), png_with_a_text_bomb()):
        with pytest.raises(UserError, match="wanted a PNG or JPEG picture"):
            read_signature(file)
    with pytest.raises(UserError, match="wanted a PNG or JPEG picture"):
        sign_picture(picture("BMP"), PROVENANCE, credentials)


def test_a_jpeg_of_several_pictures_is_signed_as_a_jpeg(credentials: Credentials) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24)).save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    read = read_signature(sign_picture(buffer.getvalue(), PROVENANCE, credentials))
    assert read is not None
    assert read.is_valid


def test_keys_are_read_from_files_and_must_fit_their_certificate(tmp_path: Path) -> None:
    first, second = demo_credentials(), demo_credentials()
    (tmp_path / "chain.pem").write_bytes(first.certificates)
    (tmp_path / "key.pem").write_bytes(first.private_key)
    (tmp_path / "other.pem").write_bytes(second.private_key)
    assert read_credentials(str(tmp_path / "chain.pem"), str(tmp_path / "key.pem")) == first
    assert "PRIVATE" not in repr(first)
    with pytest.raises(UserError, match="is not the key of the first certificate"):
        read_credentials(str(tmp_path / "chain.pem"), str(tmp_path / "other.pem"))
    with pytest.raises(UserError, match="wanted PEM certificates"):
        read_credentials(str(tmp_path / "key.pem"), str(tmp_path / "key.pem"))
    with pytest.raises(UserError, match="cannot be read"):
        read_credentials(str(tmp_path / "nothing.pem"), str(tmp_path / "key.pem"))

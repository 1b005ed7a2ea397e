"""Signs pictures with a C2PA manifest of their origin, and reads and checks the manifest of a picture.

The manifest names each neighbor as an ingredient (`inputTo`), the source type `trainedAlgorithmicMedia`, and digests
of the model and of the databases. The signature covers all bytes of the file: a changed pixel makes it invalid.
C2PA 2.2, sections "Ingredients" and "Actions". No server is asked, neither to sign nor to check.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from PIL import Image

from retrieval.errors import UserError
from retrieval.extras import extras_named
from retrieval.pictures.decode import PictureError, codec_errors
from retrieval.provenance.signing_key import Credentials

with extras_named():
    import c2pa

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
DIGESTS = "laion-rdm.digests"
"""Label of our assertion: digests of the model and of the databases."""
FORMATS = ("PNG", "JPEG")
MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "MPO": "image/jpeg"}
"""By Pillow's name of the format. MPO: a JPEG with further pictures behind the first."""
OFFLINE = {"verify": {"remote_manifest_fetch": False}}
WITHOUT_THUMBNAIL = {"builder": {"thumbnail": {"enabled": False}}}


@dataclass(frozen=True)
class Provenance:
    """Where a generated picture comes from."""

    title: str
    digests: Mapping[str, Any]
    """Values for JSON: digests of the model, its parts and the databases."""
    neighbors: Sequence[Mapping[str, Any]]
    """With `image_id` and `similarity`; `database`, `url`, `caption`, `license`, `creator` where known."""


@dataclass(frozen=True)
class SignedPicture:
    """What the signature of a picture says, and whether it holds."""

    is_valid: bool
    """The file is the one that was signed, and the certificate has not expired."""
    is_trusted: bool
    """The signer's certificate comes from one of the given authorities."""
    problems: tuple[str, ...]
    """C2PA's codes of failed checks."""
    signer: str
    generator: str
    digests: dict[str, Any]
    neighbors: tuple[dict[str, Any], ...]
    """As in `Provenance`; `image_id` is an int."""


def sign_picture(picture: bytes, provenance: Provenance, credentials: Credentials) -> bytes:
    """A PNG or JPEG file with a signed manifest. Two signatures of equal pictures differ.

    Raises UserError for other files, or if the certificate cannot sign pictures.
    """
    media_type = _media_type(picture)
    signed = io.BytesIO()
    context = c2pa.Context.from_dict(OFFLINE | WITHOUT_THUMBNAIL)
    algorithm = c2pa.C2paSigningAlg[credentials.algorithm.upper()]
    info = c2pa.C2paSignerInfo(algorithm, credentials.certificates, credentials.private_key, None)
    try:
        with (
            c2pa.Signer.from_info(info) as signer,
            c2pa.Builder(json.dumps(manifest_definition(provenance, media_type)), context=context) as builder,
        ):
            builder.sign(signer, media_type, io.BytesIO(picture), signed)
    except c2pa.C2paError as error:
        raise UserError(
            f"the picture cannot be signed: {error}. C2PA wants a certificate for digital signatures that an authority "
            "issued, with the usage 'email protection' or 'document signing'."
        ) from error
    return signed.getvalue()


def manifest_definition(provenance: Provenance, media_type: str) -> dict[str, Any]:
    """The manifest for c2pa's builder."""
    ingredients = [_ingredient(number, neighbor) for number, neighbor in enumerate(provenance.neighbors)]
    created = {
        "action": "c2pa.created",
        "digitalSourceType": GENERATED,
        "parameters": {"ingredientIds": [ingredient["label"] for ingredient in ingredients]},
    }
    return {
        "claim_generator_info": [{"name": "laion-rdm", "version": version("laion-rdm")}],
        "title": provenance.title,
        "format": media_type,
        "ingredients": ingredients,
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [created]}},
            {"label": DIGESTS, "data": dict(provenance.digests)},
        ],
    }


def _ingredient(number: int, neighbor: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: value for key, value in neighbor.items() if value not in (None, "")}
    # As text, because readers of JSON may round a number of 64 bits.
    known["image_id"] = str(neighbor["image_id"])
    ingredient = {
        "title": known.pop("caption", "") or known["image_id"],
        "relationship": "inputTo",
        "label": f"neighbor-{number}",
        "instance_id": f"laion-rdm:{known.get('database', '')}/{known['image_id']}",
        "metadata": known,
    }
    if url := known.pop("url", ""):
        ingredient["informational_URI"] = url
    return ingredient


def read_signature(picture: bytes, authorities: bytes = b"") -> SignedPicture | None:
    """The manifest of a PNG or JPEG file, checked; None if it has none.

    authorities: certificates (PEM) of trusted authorities. Raises UserError for other files and damaged manifests.
    """
    media_type = _media_type(picture)
    trust = {"trust": {"trust_anchors": authorities.decode("latin-1")}} if authorities else {}
    try:
        context = c2pa.Context.from_dict(OFFLINE | trust)
        reader = c2pa.Reader.try_create(media_type, io.BytesIO(picture), context=context)
        if reader is None:
            return None
        with reader:
            store = json.loads(reader.json())
    except c2pa.C2paError as error:
        raise UserError(f"the picture's C2PA manifest cannot be read: {error}") from error
    return signed_picture(store)


def signed_picture(store: dict[str, Any]) -> SignedPicture:
    """What the report of a reader of C2PA says. store: its JSON."""
    manifest = store["manifests"][store["active_manifest"]]
    state, signature = store["validation_state"], manifest.get("signature_info", {})
    assertions = {assertion["label"]: assertion["data"] for assertion in manifest.get("assertions", [])}
    generator = (manifest.get("claim_generator_info") or [{}])[0]
    digests = assertions.get(DIGESTS)
    return SignedPicture(
        is_valid=state in ("Valid", "Trusted"),
        is_trusted=state == "Trusted",
        problems=tuple(status["code"] for status in store.get("validation_status") or []),
        signer=f"{signature.get('common_name', '?')} ({signature.get('issuer', '?')})",
        generator=f"{generator.get('name', '?')} {generator.get('version', '')}".strip(),
        digests=digests if isinstance(digests, dict) else {},
        neighbors=tuple(_neighbor(each) for each in manifest.get("ingredients", []) if _is_neighbor(each)),
    )


def _is_neighbor(ingredient: dict[str, Any]) -> bool:
    image_id = ingredient.get("metadata", {}).get("image_id")
    return ingredient.get("relationship") == "inputTo" and bool(re.fullmatch(r"-?\d{1,19}", str(image_id)))


def _neighbor(ingredient: dict[str, Any]) -> dict[str, Any]:
    metadata = ingredient["metadata"]
    return {
        **metadata,
        "image_id": int(metadata["image_id"]),
        "caption": ingredient.get("title", ""),
        "url": ingredient.get("informational_URI", ""),
    }


def _media_type(picture: bytes) -> str:
    try:
        with codec_errors(), Image.open(io.BytesIO(picture), formats=FORMATS) as image:
            return MEDIA_TYPES[str(image.format)]
    except PictureError as error:
        raise UserError(f"wanted a PNG or JPEG picture: {error}") from error

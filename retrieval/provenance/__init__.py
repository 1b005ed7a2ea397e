"""Signed statements in pictures (C2PA) of where they come from: neighbors, model, databases. Needs the extra `c2pa`."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from retrieval.provenance.c2pa_manifest import Provenance, SignedPicture, read_signature, sign_picture
    from retrieval.provenance.signing_key import Credentials, demo_credentials, read_credentials

__getattr__ = public_names(__name__)

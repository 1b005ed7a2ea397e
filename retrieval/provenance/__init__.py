"""Signed statements in pictures (C2PA) of where they come from: neighbors, model, databases. Needs the extra `c2pa`."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from retrieval.provenance.credentials import Credentials, demo_credentials, read_credentials
    from retrieval.provenance.signature import Provenance, SignedPicture, read_signature, sign_picture

__getattr__ = public_names(
    __name__,
    {
        "credentials": "Credentials demo_credentials read_credentials",
        "signature": "Provenance SignedPicture read_signature sign_picture",
    },
)

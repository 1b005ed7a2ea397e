"""The identity of an encoder: stored in every manifest, compared before every search."""

import hashlib

from retrieval.config import Config


class EncoderIdentity(Config):
    """Vectors are comparable if the identities of their encoders are equal."""

    model: str
    """Name of the architecture (open_clip's) or of a local folder."""
    weights: str
    """First 16 hex digits of the SHA-256 of all weights, ordered by name."""
    preprocessing: str
    """Size, mean, standard deviation and interpolation of the image transform, as JSON."""
    dim: int
    """Length of a vector."""

    @property
    def digest(self) -> str:
        """The identity as 16 hex digits, for fingerprints."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

"""Which encoder made a set of vectors: stated in every manifest, compared before any search."""

import hashlib

from retrieval.config import Config


class EncoderIdentity(Config):
    """What makes two encoders' vectors comparable."""

    model: str
    """Name of the architecture: open_clip's, or that of a local folder."""
    weights: str
    """First 16 hex digits of the SHA-256 of all weights in order of their names."""
    preprocessing: str
    """Size, mean, standard deviation and interpolation of the image transform, as JSON."""
    dim: int
    """Length of a vector."""

    @property
    def digest(self) -> str:
        """The whole identity in 16 hex digits, for fingerprints."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

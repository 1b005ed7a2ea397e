"""What the page and its API allow: section [explore] of a recipe."""

from retrieval.config import Config, speed


class ExploreConfig(Config):
    """Limits of what one visitor may ask, so that none keeps the others waiting for long."""

    max_pictures: int = speed(500_000, ge=0)
    """Rows of the largest database whose pictures are looked up in tars: 24 bytes of memory each."""
    max_k: int = speed(100, ge=1)
    """Most neighbors of one search or picture."""
    max_steps: int = speed(250, ge=1)
    """Most denoising steps of a picture."""
    max_styles: int = speed(16, ge=1)
    """Most databases that are compared or mixed."""
    max_text: int = speed(1000, ge=1)
    """Longest text, in characters."""
    max_images: int = speed(4, ge=0)
    """Most pictures that condition one sample."""
    max_upload_bytes: int = speed(10 << 20, ge=1)
    """Largest picture that is taken, in bytes."""
    max_upload_pixels: int = speed(40_000_000, ge=1)
    """Largest picture that is decoded: width x height."""
    max_searches: int = speed(256, ge=1)
    """Searches under way and waiting; one more is answered with 429."""
    search_threads: int = speed(2, ge=1)
    """Searches computed side by side."""
    search_timeout_s: float = speed(10.0, gt=0)
    """Longest time of a search with its waiting, in seconds."""
    max_samples: int = speed(8, ge=1)
    """Requests for samples under way and waiting; they are computed one at a time."""
    sample_timeout_s: float = speed(300.0, gt=0)
    """Longest time of a request for samples with its waiting, in seconds."""

    @property
    def max_body_bytes(self) -> int:
        """Of a request: all its pictures in base64, and some room for words."""
        return (max(1, self.max_images) * self.max_upload_bytes * 4) // 3 + (1 << 20)

"""Limits of the explore page and its API: section [explore] of a recipe."""

from retrieval.config import Config, runtime_setting


class ExploreConfig(Config):
    """Limits for each visitor, so that one visitor cannot block the others."""

    max_rows_with_pictures: int = runtime_setting(500_000, ge=0)
    """Largest database with pictures, in rows: the index of its tars takes 24 bytes of memory a row."""
    max_k: int = runtime_setting(100, ge=1)
    """Maximum number of neighbors of one search or picture."""
    max_steps: int = runtime_setting(250, ge=1)
    """Maximum number of denoising steps of a picture."""
    max_styles: int = runtime_setting(16, ge=1)
    """Maximum number of databases that are compared or mixed."""
    max_text_characters: int = runtime_setting(1000, ge=1)
    """Longest text, in characters."""
    max_condition_images: int = runtime_setting(4, ge=0)
    """Maximum number of pictures that condition one sample."""
    max_upload_bytes: int = runtime_setting(10 << 20, ge=1)
    """Largest uploaded file, in bytes."""
    max_upload_pixels: int = runtime_setting(40_000_000, ge=1)
    """Largest uploaded picture, width x height."""
    max_uploads_bytes: int = runtime_setting(1 << 30, ge=1)
    """Most bytes that all visitors together may upload within an hour; after that the uploads are deleted."""
    max_searches: int = runtime_setting(256, ge=1)
    """Maximum number of searches that run and wait; the next request gets status 429."""
    search_threads: int = runtime_setting(2, ge=1)
    """Searches computed in parallel."""
    search_timeout_s: float = runtime_setting(10.0, gt=0)
    """Timeout of the wait for a turn, of encoding a text, and of the search after it, in seconds."""
    max_thumbnails: int = runtime_setting(1024, ge=1)
    """Maximum number of thumbnails that are made and waiting; the browser asks for all of a result at once."""
    max_samples: int = runtime_setting(8, ge=1)
    """Maximum number of sampling requests running and waiting; they run one at a time."""
    sample_timeout_s: float = runtime_setting(300.0, gt=0)
    """Timeout of a sampling request, queueing included, in seconds."""

    @property
    def max_body_bytes(self) -> int:
        """Largest request body: all pictures in base64, and 1 MiB for the other fields."""
        return (max(1, self.max_condition_images) * self.max_upload_bytes * 4) // 3 + (1 << 20)

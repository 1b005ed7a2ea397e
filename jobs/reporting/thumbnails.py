"""Pictures of a stage's tars as small data URLs, for pages that load nothing from the network."""

import base64
import io
import tarfile
from collections.abc import Iterable, Iterator

from PIL import Image

from retrieval.errors import UserError
from retrieval.storage.root import Root
from retrieval.storage.schema import sample_key

QUALITY = 88
TEXT_SUFFIXES = ("txt", "json")
"""Members of a sample that are no picture."""


def thumb(picture: Image.Image, edge: int) -> str:
    """A picture as the data URL of a JPEG, its longer edge at most `edge` pixels."""
    small = picture.convert("RGB")
    small.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def stored_pictures(root: Root, name: str, image_ids: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """Image id and picture file of the samples of a tar with these ids, in the order of the tar.

    Reads the tar up to the last of them. Ids that it does not hold are left out. Raises UserError for a damaged tar.
    """
    ids = {sample_key(image_id): image_id for image_id in image_ids}
    try:
        with root.open(name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while ids and (member := tar.next()):
                key, _, suffix = member.name.partition(".")
                if suffix not in TEXT_SUFFIXES and key in ids and (data := tar.extractfile(member)):
                    yield ids.pop(key), data.read()
    except tarfile.TarError as error:
        raise UserError(
            f"{root.at(name)} is no complete tar: {error}. Delete it and run 'make download' again."
        ) from error

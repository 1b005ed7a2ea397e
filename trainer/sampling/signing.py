"""PNG files of samples, signed with a statement of where they come from (C2PA, see `retrieval.provenance`).

Takes samples and the credentials of a recipe, returns bytes. Writes no files.
"""

from typing import TYPE_CHECKING, Any

from retrieval.errors import UserError
from trainer.sampling.picture import png_bytes
from trainer.sampling.recipe import DEMO_CERTIFICATE, SampleConfig
from trainer.sampling.request import Neighbor, Sample

if TYPE_CHECKING:
    from retrieval.provenance import Credentials


def picture_credentials(config: SampleConfig) -> "Credentials | None":
    """The credentials that sign the pictures of a recipe; None if they are not signed. Raises UserError."""
    if not config.certificate:
        if config.private_key:
            raise UserError("[sample] has a private_key but no certificate. Set certificate, or remove private_key.")
        return None
    from retrieval.provenance import demo_credentials, read_credentials

    if config.certificate == DEMO_CERTIFICATE:
        return demo_credentials()
    return read_credentials(config.certificate, config.private_key)


def sample_png(sample: Sample, credentials: "Credentials | None") -> bytes:
    """The PNG of a sample with its recipe in the metadata, signed if there are credentials."""
    png = png_bytes(sample.picture, sample.recipe())
    if credentials is None:
        return png
    from retrieval.provenance import Provenance, sign_picture

    digests = {**sample.model_identity, "databases": sample.database_identities}
    title = sample.request.prompt or "a picture without a prompt"
    return sign_picture(png, Provenance(title, digests, [_facts(each) for each in sample.neighbors]), credentials)


def _facts(neighbor: Neighbor) -> dict[str, Any]:
    """The neighbor as `Provenance` names its properties."""
    return {
        "image_id": neighbor.image_id,
        "similarity": neighbor.similarity,
        "database": neighbor.database,
        "url": neighbor.url,
        "caption": neighbor.caption,
        "license": neighbor.details.get("license"),
        "creator": neighbor.details.get("artist"),
    }

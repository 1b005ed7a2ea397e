"""Column names of public data sets, by the name of the data set (`filter.metadata_format`)."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.recipe import Columns, MetadataFormatName


@dataclass(frozen=True)
class MetadataFormat:
    """How a data set publishes its metadata."""

    columns: Mapping[str, tuple[str, ...]]
    """The file's names of a column, in lower case, by our name. A column without names is not published."""
    header: tuple[str, ...] = ()
    """Names of the columns of text files without a header line."""
    quoted_tsv: bool = False
    """Whether fields of .tsv files may be in quotes and contain line breaks; those of .csv files may."""


LAION = MetadataFormat(
    {name: (name,) for name in Columns.model_fields if name not in ("md5", "sha256", "face_boxes")}
    | {"caption": ("text", "caption"), "aesthetic": ("aesthetic", "aesthetic_score")}
)
"""LAION: URL, TEXT, WIDTH, HEIGHT, similarity, pwatermark, punsafe, LICENSE. Re-LAION: url, caption, ...

Multilingual subsets have LANGUAGE; subsets selected by aesthetic score have `aesthetic` or, later, AESTHETIC_SCORE."""
CONCEPTUAL = {"url": ("url", "image_url"), "caption": ("caption",)}

METADATA_FORMATS: dict[MetadataFormatName, MetadataFormat] = {
    "laion": LAION,
    "relaion": LAION,
    # Without DataComp's `sha256`: of files downloaded later 14 % differed from it, at least one of them a file that had
    # not changed since 2019 (a report in mlfoundations/datacomp). DataComp's own download does not compare it either.
    "datacomp": MetadataFormat(
        {
            "url": ("url",),
            "caption": ("text",),
            "width": ("original_width",),
            "height": ("original_height",),
            "similarity": ("clip_l14_similarity_score",),
            "face_boxes": ("face_bboxes",),
        }
    ),
    "coyo": MetadataFormat(
        {
            "url": ("url",),
            "caption": ("text",),
            "width": ("width",),
            "height": ("height",),
            "similarity": ("clip_similarity_vitl14",),
            "pwatermark": ("watermark_score",),
            "punsafe": ("nsfw_score_opennsfw2",),
            "aesthetic": ("aesthetic_score_laion_v2",),
        }
    ),
    "cc3m": MetadataFormat(CONCEPTUAL, header=("caption", "url")),
    "cc12m": MetadataFormat(CONCEPTUAL, header=("url", "caption")),
    "wit": MetadataFormat(
        {
            "url": ("image_url",),
            "caption": ("caption_reference_description",),
            "width": ("original_width",),
            "height": ("original_height",),
            "language": ("language",),
        },
        quoted_tsv=True,
    ),
}

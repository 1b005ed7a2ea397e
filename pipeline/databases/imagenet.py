"""The classes of ImageNet's pictures, as captions.

Reads `LOC_synset_mapping.txt` or `synset_words.txt` with a line `n01440764 tench, Tinca tinca` for each class, and
`LOC_val_solution.csv` with a line `ILSVRC2012_val_00000001,n01751748 111 108 230 366` for each picture of the
validation set: its class and the boxes of its objects. The files lie in the source or in one of four folders above.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from pipeline.databases.sources import SourcePicture, words

CLASS_NUMBER = re.compile(r"n\d{8}")
"""The name of a class: that of its folder, and of its tar in the archive of the training set."""
CLASS_NAMES = ("LOC_synset_mapping.txt", "synset_words.txt")
SOLUTIONS = ("LOC_val_solution.csv",)


def with_class_names(pictures: Sequence[SourcePicture], source: Path) -> list[SourcePicture]:
    """The pictures, those with a class of ImageNet as caption with the first name of that class; others as they are.

    Pictures of the validation set without an own caption get the class that the solution file states.
    """
    names = dict(_lines(source, CLASS_NAMES, r"^(n\d{8})\s+([^,\n]+)"))
    classes = dict(_lines(source, SOLUTIONS, r"^(ILSVRC2012_val_\d{8}),(n\d{8})\b"))
    captions = [_class_of(picture, classes) for picture in pictures]
    return [
        replace(picture, caption=names[caption].strip() if caption in names else caption)
        for picture, caption in zip(pictures, captions, strict=True)
    ]


def _class_of(picture: SourcePicture, classes: dict[str, str]) -> str:
    """The class of a picture of the validation set; of another picture the caption."""
    stem = PurePosixPath(picture.name).stem
    has_own_caption = picture.caption not in (words(stem), words(picture.label))
    return picture.caption if has_own_caption else classes.get(stem, picture.caption)


def _lines(source: Path, files: Sequence[str], pattern: str) -> list[tuple[str, str]]:
    """The two groups of a pattern in the lines of the first of these files that exists; none without a file."""
    start = source if source.is_dir() else source.parent
    folders = [start, *start.resolve().parents][:5]
    for file in (folder / name for folder in folders for name in files):
        if file.is_file():
            return re.findall(pattern, file.read_text("utf-8", errors="replace"), re.MULTILINE)
    return []

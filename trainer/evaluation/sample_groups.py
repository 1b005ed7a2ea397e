"""Draws groups of samples and stores them; each group is one resumable item.

Writes for each group `samples/<group>/<n>.png`, with the recipe in the metadata, and the CLIP features `features.npy`.
"""

import io
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import FileRecord
from trainer.evaluation.metrics import Features
from trainer.evaluation.pixel_judge import thumbnails
from trainer.evaluation.scores import FeaturesByGroup, SampleFeatures
from trainer.evaluation.styles import SampleGroup, StyleGroup
from trainer.sampling.batches import SamplingBatch
from trainer.sampling.picture import open_picture, png_bytes
from trainer.sampling.request import Sample
from trainer.sampling.resumable import ResumableItems
from trainer.sampling.sampler import Sampler

Group = TypeVar("Group", bound=SampleGroup)


def draw_groups(
    sampler: Sampler,
    groups: Sequence[Group],
    items: ResumableItems,
    plan: Callable[[Group], Sequence[SamplingBatch]] | None = None,
) -> list[ShardRecord]:
    """Draw the groups without a record. Returns the records of all groups, in order.

    plan: forms the batches of a group, with positions of its requests; default: `sampler.plan`.
    """
    stage = items.stage.rsplit("/", maxsplit=1)[-1]
    plan = plan or (lambda group: sampler.plan(group.requests))
    records = {group.name: record for group in groups if (record := items.read_record(group.name))}
    missing = [group for group in groups if group.name not in records]
    total, count = (sum(len(group.requests) for group in part) for part in (groups, missing))
    started = time.monotonic()
    pending: deque[tuple[Group, SamplingBatch]] = deque()

    def batches() -> Iterator[SamplingBatch]:
        for group in missing:
            for batch in plan(group):
                pending.append((group, batch))
                yield batch

    finished: dict[int, Sample] = {}
    with tqdm(total=total, initial=total - count, desc=stage, unit="image", mininterval=0.5) as bar:
        for samples in sampler.draw(batches()):
            group, batch = pending.popleft()
            finished.update(zip(batch.positions, samples, strict=True))
            bar.update(len(samples))
            if len(finished) == len(group.requests):
                items.require_begun()
                files = _write(sampler, group, [finished[i] for i in range(len(finished))], items)
                records[group.name] = items.write_record(group.name, files, len(finished))
                finished = {}
    seconds = time.monotonic() - started
    rate = count / max(seconds, 1e-9)
    logging.getLogger(stage).info(f"{stage}: {count} images  {seconds:.1f} s  {rate:.2f} images/s")
    return [records[group.name] for group in groups]


def read_features(sampler: Sampler, group: SampleGroup, items: ResumableItems) -> SampleFeatures:
    """The stored features of a group's pictures, the features of its prompts, and the pixels."""
    with items.root.open(_features_path(group, items)) as file:
        features: Features = np.load(file, allow_pickle=False)
    names = (picture_path(group, items, number) for number in range(len(group.requests)))
    pixels = thumbnails(open_picture(items.root, name) for name in names)
    return SampleFeatures(features, sampler.encoder.encode_texts(group.prompts), group.prompts, pixels)


def features_by_group(sampler: Sampler, groups: Iterable[StyleGroup], items: ResumableItems) -> FeaturesByGroup:
    """The features of groups by mode and style."""
    return {(group.mode, group.style): read_features(sampler, group, items) for group in groups}


def picture_path(group: SampleGroup, items: ResumableItems, number: int) -> str:
    """Path of a group's picture below the root."""
    return f"{items.stage}/samples/{group.name}/{number:04d}.png"


def _write(sampler: Sampler, group: SampleGroup, samples: Sequence[Sample], items: ResumableItems) -> list[FileRecord]:
    files = [
        items.root.write_bytes(picture_path(group, items, number), png_bytes(sample.picture, sample.recipe()))
        for number, sample in enumerate(samples)
    ]
    buffer = io.BytesIO()
    features = sampler.encoder.encode_images([sample.picture for sample in samples])
    np.save(buffer, features, allow_pickle=False)
    return [*files, items.root.write_bytes(_features_path(group, items), buffer.getvalue())]


def _features_path(group: SampleGroup, items: ResumableItems) -> str:
    return f"{items.stage}/samples/{group.name}/features.npy"

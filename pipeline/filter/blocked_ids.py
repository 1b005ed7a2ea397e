"""Image ids that the blocklist of a finished filter listed later (`later_blocked` writes them). Does not import Ray."""

from dataclasses import replace

import numpy as np

from pipeline.runtime.id_files import Ids, read_ids
from pipeline.web.blocklist import Blocklist
from retrieval.storage.manifest import Manifest
from retrieval.storage.root import FileRecord, Root


def later_blocked_ids(root: Root, selected: Manifest) -> Ids:
    """Ids in the shards of a finished filter that its blocklist listed later, ascending."""
    return read_ids(root, [file.name for file in id_files(selected)])


def with_later_blocked(blocklist: Blocklist, root: Root, selected: Manifest) -> Blocklist:
    """The blocklist of `download` with the ids of `later_blocked_ids`."""
    return replace(blocklist, ids=np.union1d(blocklist.ids, later_blocked_ids(root, selected)))


def id_files(manifest: Manifest) -> list[FileRecord]:
    """The file of the ids that were blocked later, if there are any."""
    stored = manifest.values.get("later_blocked")
    return [FileRecord(**stored)] if stored else []

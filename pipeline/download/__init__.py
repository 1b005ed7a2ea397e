"""The stage `download`: fetches the selected images into WebDataset shards with a status for every URL."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from pipeline.download.download import run
    from pipeline.download.shard_download import ShardDownload
    from pipeline.download.shard_update import ShardUpdate

__getattr__ = public_names(__name__)

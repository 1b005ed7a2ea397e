"""Storage: folders on disk or in object stores, manifests, and the schemas of all tables."""

from retrieval.storage.manifest import Manifest, read_manifest
from retrieval.storage.root import FileRecord, Root

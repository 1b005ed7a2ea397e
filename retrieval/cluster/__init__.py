"""Ray: a database served by actors, and the connection that all stages use. Needs the extra `pipeline`."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from retrieval.cluster.cluster import Cluster, ClusterConfig
    from retrieval.cluster.connection import ray_connection
    from retrieval.cluster.shared import SharedCluster

__getattr__ = public_names(__name__)

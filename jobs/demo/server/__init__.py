"""The demo's web server: serves the pictures of the demo world and simulates common failures."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from jobs.demo.server.server import WorldServer

__getattr__ = public_names(__name__, {"server": "WorldServer"})

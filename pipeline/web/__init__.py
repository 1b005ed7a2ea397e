"""HTTP: canonical URLs, the blocklist, robots.txt, limits per host, and requests to public addresses only."""

from pipeline.web.blocklist import Blocklist, read_blocklist
from pipeline.web.fetch import Fetcher, FetchSettings
from pipeline.web.fetch_error import FetchError
from pipeline.web.host_queue import FetchRequest, HostLimits, HostQueue
from pipeline.web.urls import canonical_url

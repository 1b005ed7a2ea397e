"""Free TCP ports on localhost, for servers that tests start.

They are outside of the range from which systems take the ports of connections and of servers that state none.
"""

import os
import socket
from contextlib import suppress

FIRST, LAST = 20_000, 32_000
PER_PROCESS = 50
_given: set[int] = set()


def free_ports(count: int) -> list[int]:
    """Ports that nothing uses, none of them twice. Test processes search from different ones on."""
    first = os.getpid() * PER_PROCESS % (LAST - FIRST)
    candidates = (FIRST + (first + number) % (LAST - FIRST) for number in range(LAST - FIRST))
    return [next(port for port in candidates if _is_free(port)) for _ in range(count)]


def free_port() -> int:
    """One such port."""
    return free_ports(1)[0]


def _is_free(port: int) -> bool:
    """Whether nothing uses a port; it is not given again."""
    if port not in _given:
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            _given.add(port)
            return True
    return False

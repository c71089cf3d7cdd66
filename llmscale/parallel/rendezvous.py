"""How ranks find each other through the launcher's exchange, told to ``torch.distributed``.

Importing this makes ``launcher://`` an init method beside torch's own ``file://``,
``tcp://`` and ``env://``.
"""

import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

from torch.distributed import Store, TCPStore, register_rendezvous_handler

from llmscale.parallel.exchange import connect, own_address, own_hosts, tell

BACKLOG = 4096


def _rendezvous(
    url: str, timeout: timedelta = timedelta(minutes=30), **_options: Any
) -> Iterator[tuple[Store, int, int]]:
    """Rank 0 serves a store at a port that is free, and the launcher passes its address on.

    The store lets in whoever reaches it, so it listens at one address where that is known.
    """
    asked = parse_qs(urlsplit(url).query)
    rank, ranks = int(asked["rank"][0]), int(asked["world_size"][0])
    store: Store
    if rank == 0:
        address = own_address()
        with socket.create_server((address, 0), backlog=BACKLOG) as listener:
            port = listener.getsockname()[1]
            store = TCPStore(
                address or "127.0.0.1",
                port,
                is_master=True,
                timeout=timeout,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        tell(0, {"hosts": [address] if address else own_hosts(), "port": port})
    else:
        served = tell(rank)
        with connect(served["hosts"], served["port"]) as line:
            host = line.getpeername()[0]
        store = TCPStore(host, served["port"], timeout=timeout, wait_for_workers=False)
    yield store, rank, ranks


register_rendezvous_handler("launcher", _rendezvous)

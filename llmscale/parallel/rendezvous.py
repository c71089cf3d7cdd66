"""How ranks find each other through the launcher's exchange, told to ``torch.distributed``.

Importing this makes ``launcher://`` an init method beside torch's own ``file://``,
``tcp://`` and ``env://``.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

from torch.distributed import Store, TCPStore, register_rendezvous_handler

from llmscale.parallel.exchange import connect, own_hosts, tell


def _rendezvous(
    url: str, timeout: timedelta = timedelta(minutes=30), **_options: Any
) -> Iterator[tuple[Store, int, int]]:
    """Rank 0 serves a store at a port that is free, and the launcher passes its address on."""
    asked = parse_qs(urlsplit(url).query)
    rank, ranks = int(asked["rank"][0]), int(asked["world_size"][0])
    store: Store
    if rank == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timeout, wait_for_workers=False)
        tell(0, {"hosts": own_hosts(), "port": store.port})
    else:
        address = tell(rank)
        with connect(address["hosts"], address["port"]) as line:
            host = line.getpeername()[0]
        store = TCPStore(host, address["port"], timeout=timeout, wait_for_workers=False)
    yield store, rank, ranks


register_rendezvous_handler("launcher", _rendezvous)

"""Processes meet through the launcher: at a free port, without waiting for a file or a clock."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmscale.parallel import exchange
from llmscale.parallel.exchange import LAUNCHER_VARIABLE, tell


def test_all_are_told_where_the_first_listens_whoever_comes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    address = {"hosts": ["node7"], "port": 4711}
    with exchange.exchange("127.0.0.1") as known, ThreadPoolExecutor(8) as threads:
        monkeypatch.setenv(LAUNCHER_VARIABLE, known.variable())
        early = [threads.submit(tell, number) for number in range(1, 5)]
        assert not early[0].done()
        assert tell(0, address) == address
        assert [asked.result(10) for asked in early] == [address] * 4
        assert tell(5) == address
    assert known.nodes == dict.fromkeys(range(6), "node7")


def test_a_stranger_learns_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with exchange.exchange("127.0.0.1") as known:
        given = json.loads(known.variable())
        monkeypatch.setenv(LAUNCHER_VARIABLE, json.dumps({**given, "token": "guess"}))
        with pytest.raises(ConnectionError, match="the launcher has ended"):
            tell(0, {"hosts": ["elsewhere"], "port": 1})
        with socket.create_connection(("127.0.0.1", given["port"]), 5) as line:
            line.sendall(b"\xff\x00 noise\n")
            assert line.recv(100) == b""
        assert known.address is None
        assert known.nodes == {}


def test_ranks_of_one_node_are_served_on_loopback_alone() -> None:
    threads = threading.active_count()
    with exchange.exchange("127.0.0.1") as known:
        others = [host for host in exchange.own_hosts() if host[0].isdigit() and host[:4] != "127."]
        for host in others:
            with pytest.raises(OSError):
                socket.create_connection((host, known.port), 2).close()
    assert threading.active_count() <= threads + 1


def test_a_launcher_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    launcher = {"hosts": ["127.0.0.1"], "port": port, "token": "x"}
    monkeypatch.setenv(LAUNCHER_VARIABLE, json.dumps(launcher))
    with pytest.raises(ConnectionError, match=f"no way from .* to port {port} of 127.0.0.1"):
        tell(0)

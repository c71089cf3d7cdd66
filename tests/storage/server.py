"""A real S3-compatible server for tests, and a way to it that can be cut."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.cluster.daemons import free_ports, wait_until

BUCKET = "bucket1"
SECONDS_TO_COME_UP = 60


class Server:
    """A server on loopback that has one bucket, and keeps objects for as long as it lives."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self._process, self.port = process, port

    def stand_still(self) -> None:
        """Keeps the server from doing anything, with all its connections open."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Lets it go on where it stood."""
        self._process.send_signal(signal.SIGCONT)


def environment(port: int) -> dict[str, str]:
    """What a user of the server behind a port has in the environment."""
    return {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }


@contextmanager
def serving() -> Iterator[Server]:
    """A server that is up inside the block and gone after it."""
    (port,) = free_ports(1)
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment(port)},
    )
    try:
        assert wait_until(lambda: _listens(port), SECONDS_TO_COME_UP), "the server is not up"
        make_bucket(port)
        yield Server(process, port)
    finally:
        process.kill()
        process.wait()


def make_bucket(port: int) -> None:
    """Makes the bucket."""
    import boto3

    told = environment(port)
    boto3.client(
        "s3",
        endpoint_url=told["AWS_ENDPOINT_URL"],
        aws_access_key_id=told["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=told["AWS_SECRET_ACCESS_KEY"],
        region_name=told["AWS_DEFAULT_REGION"],
    ).create_bucket(Bucket=BUCKET)


def _listens(port: int) -> bool:
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    return False


class Way:
    """A port that leads to a server, and can be cut in the middle of what goes through it.

    Args:
        port: the server's.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.is_cut = threading.Event()
        self.cut_after: int | None = None
        """Cuts the way as soon as so many more bytes have gone to the server."""
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Ends all connections, and every new one at once, until it is mended."""
        self.is_cut.set()

    def mend(self) -> None:
        """Lets connections through again."""
        self.cut_after = None
        self.is_cut.clear()

    def close(self) -> None:
        """Ends it for good."""
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with suppress(OSError), client, socket.create_connection(("127.0.0.1", self._target)) as to:
            while not self.is_cut.is_set():
                ready, _, _ = select.select([client, to], [], [], 0.05)
                for side in ready:
                    content = side.recv(2**14)
                    if not content:
                        return
                    if side is client and self._counted(len(content)):
                        return
                    (to if side is client else client).sendall(content)

    def _counted(self, size: int) -> bool:
        """Whether this is where the way is cut."""
        if self.cut_after is not None:
            self.cut_after -= size
            if self.cut_after < 0:
                self.cut()
        return self.is_cut.is_set()

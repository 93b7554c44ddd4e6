"""Start, run and stop the server."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from mmfix_evals.errors import EvalError
from mmfix_evals.serve.app import create_app
from mmfix_evals.serve.service import Service

BACKLOG = 128


def bind(host: str, port: int) -> socket.socket:
    """A socket on `host` and `port` (0 for a free one) that does not listen yet.

    Raises:
        EvalError: the port is taken, or the address is none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise EvalError(f"cannot listen on {host}: {error.strerror or error}; check --host") from error
    try:
        if os.name == "posix":  # elsewhere this would let two servers share a port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise EvalError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port") from error
    return found


def address(sock: socket.socket) -> str:
    """The API's URL."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def make_server(service: Service, grace: float) -> uvicorn.Server:
    """A server that is yet to be run.

    Args:
        service: what it serves.
        grace: seconds that requests under way have to end after a stop.
    """
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        timeout_graceful_shutdown=max(int(grace), 1),
        h11_max_incomplete_event_size=64 * 1024,
        http="h11",
        ws="none",
    )
    return uvicorn.Server(config)


def run(service: Service, sock: socket.socket, grace: float, quiet: bool) -> None:
    """Serve until SIGINT or SIGTERM; then accept no more, let requests under way end, and return."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("mmfix.serve").setLevel(logging.WARNING if quiet else logging.INFO)
    server = make_server(service, grace)
    sock.listen(BACKLOG)
    with _stop_is_no_failure():
        print(f"mmfix: serving {', '.join(service.catalogue.names())} at {address(sock)}", file=sys.stderr, flush=True)
        server.run(sockets=[sock])


@contextmanager
def _stop_is_no_failure() -> Iterator[None]:
    """uvicorn raises the signals that stopped it once more when it is done; here they mean a normal end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

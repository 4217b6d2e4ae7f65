"""Ports and processes of a run that must leave nothing behind."""

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager

import psutil

_MARK = "RAYSERVE_HOOKS_RUN"


def free_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def none_left() -> Iterator[None]:
    """End, after the block, every process that was started in it.

    Ray's daemons and the engine's processes are no children of this one for long; all inherit
    its environment, so that is where they are marked.
    """
    outer, mark = os.environ.get(_MARK), uuid.uuid4().hex
    os.environ[_MARK] = mark
    try:
        yield
    finally:
        if outer is None:
            del os.environ[_MARK]
        else:
            os.environ[_MARK] = outer
        left = marked(_MARK, mark)
        _, alive = psutil.wait_procs(left, timeout=15)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive)


def marked(name: str, value: str) -> list[psutil.Process]:
    """Find the other processes in whose environment a variable has a value."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(name) == value:
                found.append(process)
        except psutil.Error:  # ended in the meantime, or somebody else's
            continue
    return found

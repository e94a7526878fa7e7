"""The guard against threads and file descriptors that a test leaves behind."""

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waits import wait_for

# How long what is on its way out may take on a busy machine.
GRACE_S = 20.0
# Opened once by a library and kept for the life of the process.
_KEPT_TARGETS = ("/dev/null", "/dev/urandom", "/dev/random", "anon_inode:[eventpoll]")
_KEPT_SUFFIXES = (".so", ".py", ".pyc", ".ttf")
_KEPT_THREADS = ("pytest_timeout", "tf_", "TF_")


@pytest.fixture(autouse=True)
def leak_guard() -> Iterator[None]:
    """Fail the test that leaves a thread or a file descriptor behind."""
    threads, descriptors = _threads(), _descriptors()
    yield
    if not _leaked(threads, descriptors):
        return

    def are_gone() -> bool:
        gc.collect()
        return not _leaked(threads, descriptors)

    wait_for(are_gone, lambda: f"left behind: {', '.join(_leaked(threads, descriptors))}", GRACE_S)


def _leaked(threads: set[threading.Thread], descriptors: dict[int, str]) -> list[str]:
    new_threads = [
        f"thread {thread.name!r}"
        for thread in _threads() - threads
        if not thread.name.startswith(_KEPT_THREADS)
    ]
    new_descriptors = [
        f"descriptor {number} ({target})"
        for number, target in _descriptors().items()
        if descriptors.get(number) != target
        and target not in _KEPT_TARGETS
        and not target.endswith(_KEPT_SUFFIXES)
    ]
    return new_threads + new_descriptors


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.is_alive()}


def _descriptors() -> dict[int, str]:
    """Descriptor number -> what it leads to; empty where there is no /proc."""
    folder = Path("/proc/self/fd")
    found: dict[int, str] = {}
    if not folder.is_dir():
        return found
    for entry in folder.iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except OSError:  # the one that listed the folder
            continue
    return found

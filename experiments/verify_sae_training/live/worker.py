"""One thread that runs the model, for one request at a time: an edit changes the whole model while it runs."""
import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

MOST_WAITING = 8  # requests
T = TypeVar("T")


class Busy(Exception):
    """Too many requests wait already."""


class Worker:
    """Runs work in turn; a newer text ends what is being written."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "model")
        self._waiting = 0
        self._stale = threading.Event()

    def newer(self) -> threading.Event:
        """End what is being written, and return the event that ends what comes next."""
        self._stale.set()
        self._stale = threading.Event()
        return self._stale

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns, or raises, in its turn. Raises Busy if MOST_WAITING others are before it."""
        if self._waiting >= MOST_WAITING:
            raise Busy
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """End what is being written, and start nothing that waits."""
        self._stale.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

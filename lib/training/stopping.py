"""Ctrl-C during a training waits until the step that is being taken is whole."""
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_between_steps(wanted: bool = True) -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C or SIGTERM only makes the yielded function return True; a second one acts at once.

    Whoever asks that function saves what was done, and then raises KeyboardInterrupt. wanted: False leaves the signals
    as they are, as do threads other than the main one, where Python allows nothing else.
    """
    came: list[int] = []

    def note(number: int, _: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        os.write(2, b"\nstopping after this step; once more stops at once\n")

    handlers = {}
    if wanted and threading.current_thread() is threading.main_thread():
        handlers = {number: handler for number in (signal.SIGINT, signal.SIGTERM)
                    if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)}  # ignored under nohup
    for number in handlers:
        signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

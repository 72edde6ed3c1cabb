"""SIGINT and SIGTERM that wait for the end of a step, so that it is not lost."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)


class SavedInterrupt(KeyboardInterrupt):
    """A signal ended a piece of work whose state was saved; the message says where."""


@contextmanager
def handlers_restored() -> Iterator[None]:
    """Restore the handlers of SIGINT, SIGTERM and SIGUSR1 after the block.

    Ray Tune leaves its own, which swallows the first signal after a search.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # not from Python
                signal.signal(number, handler)


@contextmanager
def deferred_interrupts(on_signal: Callable[[], object]) -> Iterator[Callable[[], bool]]:
    """Let the first signal wait while the block runs; yield a function that says whether it came.

    `on_signal` is called when it comes; a second one interrupts at once, and so does the first when the block
    ends or fails without an interrupt: the failure is logged, and nobody recovers from it. Only in the main
    thread, and only signals that would raise KeyboardInterrupt: others' handlers, such as Ray's, stay.
    """
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True
        on_signal()

    is_main = threading.current_thread() is threading.main_thread()
    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if is_main and signal.getsignal(number) is signal.default_int_handler
    ]
    for number in numbers:
        signal.signal(number, note)
    try:
        yield lambda: came
    except Exception as error:
        if not came:
            raise
        log.error("after the signal: %s", error)
    finally:
        for number in numbers:
            signal.signal(number, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt

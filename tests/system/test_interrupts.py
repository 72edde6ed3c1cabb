from __future__ import annotations

import signal
import threading

import pytest

from ddray.system.interrupts import deferred_interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_and_a_second_interrupts(number: signal.Signals) -> None:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    calls: list[str] = []
    try:
        with deferred_interrupts(lambda: calls.append("said")) as interrupted:
            assert not interrupted()
            signal.raise_signal(number)
            assert interrupted()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == ["said"]


def test_others_handlers_stay() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with deferred_interrupts(lambda: None) as interrupted:
            signal.raise_signal(signal.SIGTERM)
            assert not interrupted()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_a_thread_installs_nothing() -> None:
    handlers: list[object] = []

    def run() -> None:
        with deferred_interrupts(lambda: None) as interrupted:
            handlers.extend([signal.getsignal(signal.SIGINT), interrupted()])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler, False]

from __future__ import annotations

import signal
import threading

import pytest

from ddray.system.interrupts import deferred_interrupts, handlers_restored


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_and_a_second_interrupts(number: signal.Signals) -> None:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    calls: list[str] = []

    def block() -> None:
        with deferred_interrupts(lambda: calls.append("said")) as interrupted:
            assert not interrupted()
            signal.raise_signal(number)
            assert interrupted()
            calls.append("waited")
            signal.raise_signal(number)
            calls.append("waited again")

    try:
        with pytest.raises(KeyboardInterrupt):
            block()
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == ["said", "waited"]


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory"), KeyboardInterrupt("saved")])
def test_a_signal_ends_a_block_that_fails_or_is_done(
    error: BaseException | None, caplog: pytest.LogCaptureFixture
) -> None:
    def block() -> None:
        with deferred_interrupts(lambda: None):
            signal.raise_signal(signal.SIGINT)
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt) as raised:
        block()
    assert str(raised.value) == ("saved" if isinstance(error, KeyboardInterrupt) else "")
    assert ("out of memory" in caplog.text) == isinstance(error, RuntimeError)


def test_handlers_that_a_library_leaves_are_undone() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]

    with handlers_restored():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: None)

    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


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

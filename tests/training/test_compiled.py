import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import CppCompileError, InductorError

from ddray.errors import InputError
from ddray.training.compiled import compiled


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


FAILURES = {
    "backend": BackendCompilerFailed(double, RuntimeError("no such back end"), None),
    "inductor": InductorError(CppCompileError(["g++"], "cannot find -lgomp"), None),
    "another library's": OSError("libcuda.so.1: cannot open shared object file"),
}


def failing(error: BaseException) -> Callable[..., Any]:
    """Return a torch.compile whose functions raise `error` at every call."""

    def compile_(function: Any, **_: Any) -> Any:
        def run(*_: Any) -> None:
            raise error

        return run

    return compile_


@pytest.mark.parametrize("failure", FAILURES)
def test_what_cannot_be_compiled_runs_eagerly_with_one_line(
    failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", failing(FAILURES[failure]))
    function = compiled(double, on=True)

    with caplog.at_level(logging.WARNING):
        results = [function(torch.ones(2)).tolist() for _ in range(3)]

    assert results == [[2.0, 2.0]] * 3
    assert function.used == "eager"
    [message] = caplog.messages
    assert message.startswith(f"not compiled ({type(FAILURES[failure]).__name__}: ")
    assert message.endswith("): steps run eagerly")
    assert "\n" not in message


def test_a_torch_without_compile_runs_eagerly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(function: Any, **_: Any) -> Any:
        raise RuntimeError("torch.compile is not supported on this Python")

    monkeypatch.setattr(torch, "compile", refuse)

    assert compiled(double, on=True)(torch.ones(1)).tolist() == [2.0]
    assert "not supported on this Python" in caplog.text


@pytest.mark.parametrize("error", [InputError("a class has no images"), torch.OutOfMemoryError("8 GiB")])
def test_the_functions_own_errors_pass(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def function(x: torch.Tensor) -> torch.Tensor:
        raise error

    with pytest.raises(type(error), match=str(error)):
        compiled(function, on=True)(torch.ones(1))
    assert not caplog.messages


def test_out_of_memory_does_not_switch_compilation_off(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [torch.OutOfMemoryError("8 GiB")]

    def compile_(function: Any, **_: Any) -> Any:
        def run(*args: Any) -> Any:
            if errors:
                raise errors.pop()
            return function(*args)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    function = compiled(double, on=True)
    with pytest.raises(torch.OutOfMemoryError):
        function(torch.ones(1))

    assert function(torch.ones(1)).tolist() == [2.0]
    assert function.used == "compiled"


def test_compiled_once_per_shape() -> None:
    shapes = []

    def backend(graph: Any, inputs: Any) -> Any:
        shapes.append(tuple(inputs[0].shape))
        return graph.forward

    function = compiled(double, on=True)
    with pytest.MonkeyPatch.context() as patch:
        real = torch.compile
        patch.setattr(torch, "compile", lambda f, **options: real(f, backend=backend, **options))
        assert [function(torch.ones(n)).tolist() for n in (2, 3, 2)] == [[2.0] * n for n in (2, 3, 2)]

    assert function.used == "compiled"
    assert shapes == [(2,), (3,)]


def test_switched_off_it_is_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", failing(AssertionError("compiled")))
    function = compiled(double, on=False)

    assert function(torch.ones(1)).tolist() == [2.0]
    assert function.used == "eager"

"""The `ddray` command: its app and exit codes. Commands import torch, Ray and others when they run."""

import logging
import os
import signal
import sys
import threading
import traceback
from typing import Annotated, Any

import typer

import ddray
from ddray.commands.bench import bench
from ddray.commands.claims import claims
from ddray.commands.data import data_info, data_list
from ddray.commands.distill import distill
from ddray.commands.doctor import doctor
from ddray.commands.evaluate import evaluate
from ddray.commands.export import export
from ddray.commands.methods import methods
from ddray.commands.nas import nas
from ddray.commands.pool import pool_list, pool_show, pool_train
from ddray.commands.report import report
from ddray.commands.tune import tune
from ddray.errors import DdrayError, InterruptedRunError
from ddray.system.memory import reuse_freed_memory

_PANELS = {  # in the order of --help
    "Distil and score": (distill, evaluate, export),
    "Search and compare": (tune, nas, bench, claims, report),
    "What there is": (methods, doctor),
}
app = typer.Typer(name="ddray", no_args_is_help=True, pretty_exceptions_enable=False)
for panel, commands in _PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
data_app = typer.Typer(help="Datasets: the known ones, and what one holds.", no_args_is_help=True)
app.add_typer(data_app, name="data", rich_help_panel="What there is")
pool_app = typer.Typer(help="Model pools: networks that many runs share, trained once.", no_args_is_help=True)
app.add_typer(pool_app, name="pool", rich_help_panel="What there is")
data_app.command("info")(data_info)
data_app.command("list")(data_list)
pool_app.command("train")(pool_train)
pool_app.command("list")(pool_list)
pool_app.command("show")(pool_show)


def _print_version(is_asked_for: bool) -> None:
    if is_asked_for:
        typer.echo(f"ddray {ddray.__version__}")
        raise typer.Exit


@app.callback()
def version(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Distil datasets, tune the distillation over a cluster, and score what comes out.

    Start with these two; the --help of each command has an example:

    ddray distill --method dm --dataset digits --ipc 1 --out digits.pt

    ddray evaluate digits.pt
    """


# Newer versions of Typer bundle click, older ones import it: the base class of Typer's error works for both.
_USAGE_ERROR: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
_NO_ARGUMENTS = "NoArgsIsHelpError"  # what is raised once the help has been printed
_INTERRUPTED = 130  # what Typer returns after Ctrl-C
_CONTINUE = "interrupted; run the command again, with --resume where its --run-dir is there by now"


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit: 0 success, 2 bad input, 1 any other failure."""
    # Must precede the import of torch: spinning OpenMP threads compete for the cores of a shared machine.
    # Two DataDAM runs at once on 2 cores took 1.1 to 8.8 s a step; with short spins 0.9 to 1.1 s (alone: 0.6,
    # both ways).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # torch.cuda.is_available() asks NVML instead of starting CUDA: drivers leave GPUs to their workers.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    reuse_freed_memory()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: one line, exit 1
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    level = logging.DEBUG if debug else logging.INFO
    logging.basicConfig(level=level, format="%(levelname)s %(message)s", handlers=[_StderrHandler()])
    for name in ("matplotlib", "torch", "filelock", "fsspec", "PIL", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    sys.exit(_run(arguments, debug))


def _run(arguments: list[str], debug: bool) -> int:
    """Run one command; return the exit code. Failures print one line on stderr."""
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="ddray", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except Exception as error:
        if type(error).__name__ == _NO_ARGUMENTS:
            return 0
        if debug and not isinstance(error, (_USAGE_ERROR, InterruptedRunError)):
            traceback.print_exc()
        return _fail(*_explain(error, arguments))
    if code == _INTERRUPTED:
        return _fail(_CONTINUE, 1)
    return code if isinstance(code, int) else 0


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes to what stderr is at the time: while progress is drawn, that prints above it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self.stream = sys.stderr
        super().emit(record)


def _explain(error: Exception, arguments: list[str]) -> tuple[str, int]:
    """Return what is printed of an error of a command, and the exit code."""
    if isinstance(error, InterruptedRunError):
        return error.with_command(arguments), error.exit_code
    if isinstance(error, _USAGE_ERROR):
        return error.format_message(), 2
    if isinstance(error, DdrayError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}", 1
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} (--debug shows the traceback)", 1


def _fail(message: str, code: int) -> int:
    sys.stderr.write("error: " + " ".join(message.split()) + "\n")
    return code


if __name__ == "__main__":
    main()

"""What commands share: options made from configs, shell completion, and the printing of results."""

import contextlib
import functools
import inspect
import json
import os
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from ddray.commands import display
from ddray.config import Config, Result, option_name

Emit = Callable[[Result, Any], None]
_JSON: Final = typer.Option(
    "--json", help="Print one JSON object on stdout, and nothing else there.", rich_help_panel="Output"
)
_PANELS: Final = {
    "What": "method dataset ipc budget kind arch archs protocol proxies baselines space split "
    "preset config sets steps scale describe scores",
    "How": "",
    "Other projects' sets": "pixel_space index factor",
    "Resources": "device shards executor num_workers cpus_per_worker gpus_per_worker cpus_per_trial "
    "gpus_per_trial cpus_per_unit gpus_per_unit cpus_per_shard gpus_per_shard max_concurrent time_budget "
    "unit_timeout address",
    "Data": "data_dir download image_size label_column clip_seconds clip_offset can_flip",
    "Run": "seed run_dir resume save retry_failed dry_run",
    "Output": "out form",
}
_COMPLETIONS: Final[dict[str, str | Sequence[str]]] = {
    "method": "ddray.methods:method_names",
    "dataset": "ddray.data.catalog:KNOWN",
    **dict.fromkeys(("arch", "archs", "teachers"), "ddray.nets.names:arch_names"),
    "protocol": "ddray.evaluation:protocol_names",
    "preset": ("paper", "repo", "d4m"),
    "scale": ("paper", "cpu", "smoke"),
    "kind": ("supervised", "ssl", "diffusion", "trajectory"),
}
"""Values of options: names, or where they are; that is imported only to complete one."""


def command(
    *configs: type[Config], example: str, arguments: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that makes a Typer command of a function, with an example in its --help.

    The command's options are the fields of the configs: name, type, default, and docstring as help; those in
    `arguments` are positional. The function gets `emit`, which prints a result, and by field name the options
    that the user has set.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        every = {name: field for config in configs for name, field in config.model_fields.items()}
        fields = dict(sorted(every.items(), key=lambda item: list(_PANELS).index(_panel(item[0]))))

        @functools.wraps(function)
        def run(*, ctx: typer.Context, as_json: bool, **values: Any) -> None:
            options = {k: v for k, v in values.items() if ctx.get_parameter_source(k).name != "DEFAULT"}  # type: ignore[union-attr]
            with output(as_json) as emit:
                function(emit, **options)

        declared = [_keyword("ctx", typer.Context)]
        for name, field in fields.items():
            plain, default = _plain(field)
            kind: Any = Annotated[plain, _parameter(name, field, name in arguments)]
            declared.append(_keyword(name, kind, default))
        declared.append(_keyword("as_json", Annotated[bool, _JSON], False))
        run.__dict__["__signature__"] = inspect.Signature(declared)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in declared}
        run.__doc__ = f"{inspect.getdoc(function)}\n\nExample: {example}"
        return run

    return decorate


def _keyword(name: str, kind: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)


def _panel(name: str) -> str:
    return next((panel for panel, names in _PANELS.items() if name in names.split()), "How")


def _plain(field: FieldInfo) -> tuple[Any, Any]:
    """Return a field's type and default as Typer takes them; choices are checked by the config."""
    kind: Any = field.annotation
    optional = False
    default = inspect.Parameter.empty if field.is_required() else field.get_default()
    while (origin := get_origin(kind)) is not None:
        if origin in (Union, types.UnionType):
            optional = type(None) in get_args(kind)
            kind = get_args(kind)[0]
        elif origin is tuple:
            item = get_args(kind)[0]
            while get_origin(item) is not None:
                item = get_args(item)[0]
            several: Any = list[item]  # type: ignore[valid-type]
            return (several, default) if field.is_required() else (several | None, None)
        else:
            kind = str if origin is Literal else get_args(kind)[0]
    return (kind | None if optional else kind), default


def _parameter(name: str, field: FieldInfo, is_argument: bool) -> Any:
    """Return Typer's declaration of a field."""
    text = " ".join(str(field.description).split())
    if is_argument:
        return typer.Argument(help=text)
    option = "--" + option_name(name, field)
    has_no = field.get_default() is True or bool in get_args(field.annotation)
    return typer.Option(
        f"{option}/--no-{option[2:]}" if has_no else option,
        help=text,
        rich_help_panel=_panel(name),
        show_default="default" not in text,
        autocompletion=_completion(name, field),
    )


def _completion(name: str, field: FieldInfo) -> Callable[[str], list[str]] | None:
    """Return the shell completion of an option whose values have names."""
    choices = _COMPLETIONS.get(name, _literals(field.annotation))

    def complete(incomplete: str) -> list[str]:
        names = pkgutil.resolve_name(choices) if isinstance(choices, str) else choices
        return [n for n in (names() if callable(names) else names) if n.startswith(incomplete)]

    return complete if choices else None


def _literals(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    return [value for inner in get_args(kind) for value in _literals(inner)]


def retyped(options: Mapping[str, Any], *configs: type[Config]) -> list[object]:
    """Return those of the options that are fields of the configs, as words to type after another command."""
    words: list[object] = []
    for name, field in ((name, field) for config in configs for name, field in config.model_fields.items()):
        value, option = options.get(name), option_name(name, field)
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            words += [f"--{option}", value]
    return words


@contextlib.contextmanager
def output(as_json: bool) -> Iterator[Emit]:
    """Yield the function that prints a command's result.

    With --json, everything that libraries print on stdout while the command runs goes to stderr, at the level
    of file descriptors, so that stdout has nothing but the JSON object.
    """
    if not as_json:
        yield lambda result, table: display.show(table() if callable(table) else table)
        return
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)

    def emit(result: Result, table: Any) -> None:
        sys.stdout.flush()
        os.write(real, (to_json(result) + "\n").encode())

    try:
        yield emit
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)


def to_json(result: Result) -> str:
    """Return a result as JSON; NaN and infinities become null."""
    defined = json.loads(json.dumps(result.dump()), parse_constant=lambda _: None)
    return json.dumps(defined, allow_nan=False)

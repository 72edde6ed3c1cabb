"""Config: frozen pydantic models fed from YAML layers and `key=value` overrides; a typo gets a hint."""

import functools
import inspect
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, cast, get_args

import yaml
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)
from pydantic.fields import FieldInfo

from ddray.errors import InputError, did_you_mean, unknown

AbsolutePath = Annotated[Path, AfterValidator(lambda path: Path(os.path.abspath(path.expanduser())))]
"""A path made absolute when it is read: Ray's workers have other working directories."""


Names = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]
"""Names, or a single one."""


def named(option: str, field: str, default: Any = ()) -> Any:
    """Return a field that is also read by the name of its option: `archs` of `--arch`."""
    return Field(default=default, validation_alias=AliasChoices(field, option))


def added(default: Any, **rules: Any) -> Any:
    """Return a field that came after a release, with pydantic's `rules`.

    At its default it is not dumped, so that runs, units and pool entries from before it keep their keys.
    """
    return Field(default=default, exclude_if=lambda value: value == default, **rules)


def option_name(name: str, field: FieldInfo) -> str:
    """Return the name of a field's option, such as `num-samples`, or `arch` of `archs`."""
    alias = field.validation_alias
    return str(alias.choices[-1] if isinstance(alias, AliasChoices) else name).replace("_", "-")


F = TypeVar("F", bound=Callable[..., Any])


class Config(BaseModel):
    """A frozen set of named values; an unknown name or a value out of range is an `InputError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, prefix: str = "", source: str = "") -> Self:
        """Validate `values`; messages put `prefix`, such as `"method."`, before names, and name the `source`.

        Raises:
            InputError: an unknown field (with the nearest name) or a value that breaks a field's rule.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise InputError(_one_line(cls, error, prefix, source)) from error

    @classmethod
    def pick(cls, options: Mapping[str, Any]) -> Self:
        """Validate the options, by field or option name, that are fields of this config, as `parse` does."""
        return cls.parse({k: v for k, v in options.items() if k in cls.option_names()}, prefix="--")

    @classmethod
    def option_names(cls) -> Collection[str]:
        """Return the names that `pick` takes: of fields, and of options where they differ."""
        names = {option_name(name, field).replace("-", "_") for name, field in cls.model_fields.items()}
        return cls.model_fields.keys() | names

    def dump(self) -> dict[str, Any]:
        """Return the values as plain JSON types, nested configs as dicts; `added` ones unless at default."""
        return self.model_dump(mode="json")

    def every_value(self) -> dict[str, Any]:
        """Return what `dump` does, and the `added` values at their default."""
        dumped = self.dump()
        return {
            name: value.every_value() if isinstance(value, Config) else dumped.get(name, value)
            for name, value in self
        }


class Result(Config):
    """What a command returns; --json prints its dump. What was not measured is absent, not None."""

    model_config = ConfigDict(allow_inf_nan=True)

    def dump(self) -> dict[str, Any]:
        """Return the values that are set, as plain JSON types; NaN stays NaN."""
        return self.model_dump(mode="json", exclude_unset=True)

    def __getitem__(self, name: str) -> Any:
        if name not in self.model_fields_set:
            raise KeyError(name)
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in self.model_fields_set


def _one_line(cls: type[BaseModel], error: ValidationError, prefix: str, source: str) -> str:
    """Turn pydantic's first error into one line: rule, value, fix."""
    errors = error.errors()
    # Report a misspelt name before the field that is missing because of it.
    first = next((detail for detail in errors if detail["type"] == "extra_forbidden"), errors[0])
    path = [part for part in first["loc"] if isinstance(part, str | int)]
    name = prefix + ".".join(map(str, path))
    if prefix == "--":
        name = name.replace("_", "-")
    where = f" (in {source})" if source else ""
    if first["type"] == "extra_forbidden":
        names = _field_names(cls, path[:-1])
        hint = did_you_mean(str(path[-1]), names) or f"; known: {', '.join(sorted(names)) or 'none'}"
        return f"unknown option {name!r}{where}{hint}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not path:
        return f"{message}{where}"
    if first["type"] == "value_error" and isinstance(first["input"], Mapping):
        return f"{name}: {message}{where}"  # fields that don't go together: it has their values
    choices = re.findall(r"'([^']*)'", first["ctx"]["expected"]) if first["type"] == "literal_error" else ()
    return f"{name}: {message}, got {first['input']!r}{where}{did_you_mean(str(first['input']), choices)}"


def _field_names(cls: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Return the field names of the (nested) model at `path` below `cls`."""
    # An index into a list is skipped: its element type was resolved with the list.
    for part in (part for part in path if isinstance(part, str)):
        inner = _model(cls.model_fields[part].annotation) if part in cls.model_fields else None
        if inner is None:
            return []
        cls = inner
    return list(cls.model_fields)


def _model(annotation: Any) -> type[BaseModel] | None:
    """Return the model that a field holds, alone or in a list; None if it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for argument in get_args(annotation) if (model := _model(argument)) is not None), None)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars, and no key twice in a mapping.

    PyYAML's are YAML 1.1's, which makes off a boolean, 010 an 8, 12:30 a 750, 2024-01-05 a date and 1e-3 a
    word. Of two equal keys YAML silently takes the last.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in names:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"line {line}: the key {key.value!r} is there twice; keep one")
                names.add((key.tag, key.value))
        return node


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(node.value)
    return int(text, 16) if "x" in text else int(text)


# YAML 1.2's core schema, with 20_000 and merge keys: tag, pattern, first characters.
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(\d+|\d{1,3}(_\d{3})+|0x[0-9a-fA-F]+)", "-+0123456789"),
    ("float", r"[-+]?(\d+\.\d*|\.\d+|(\d+\.?\d*|\.\d+)[eE][-+]?\d+)", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", "<<", "<"),
)
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), [*_first])
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


class _Dumper(yaml.SafeDumper):
    """Quotes the words that `_Loader` takes for numbers, such as 08 and 1e5, besides those of YAML 1.1."""


for _tag, _pattern, _first in _SCALARS:
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), [*_first])


def yaml_of(values: Mapping[str, Any]) -> str:
    """Return the YAML that `read_yaml` reads these values from."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False)


def _load(text: str) -> Any:
    return yaml.load(text, _Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; InputError if the file is missing, is not YAML, or is not a mapping.

    A key that a mapping names twice, at any depth, is an InputError too.
    """
    try:
        values = _load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config file must be readable, got {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # YAML raises ValueError for `!!int x`
        reason = " ".join(str(error).split())
        raise InputError(f"config file must be YAML, got {path}: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"config file must hold a mapping of names to values, got {path}")
    return values


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """Turn `["steps=3", "method.p=.1"]` into `{"steps": 3, "method": {"p": 0.1}}`; the last one wins.

    A pair without `=`, without a name, or with a value that is not YAML is an InputError.
    """
    overrides: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not all(name.strip().split(".")):
            raise InputError(f"--set takes key=value, got {pair!r}; example: --set lr_img=0.5")
        try:
            value = _load(text)
        except (yaml.YAMLError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"--set {name}: the value must be YAML, got {text!r}: {reason}") from error
        overrides = merge(overrides, nest(name.strip(), value))
    return overrides


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to one level with dotted names."""
    leaves: dict[str, Any] = {}
    for name, child in value.items():
        path = f"{prefix}{name}"
        leaves |= flatten(child, f"{path}.") if isinstance(child, Mapping) else {path: child}
    return leaves


def nest(name: str, value: Any) -> dict[str, Any]:
    """Return `{"a": {"b": value}}` for the dotted name `"a.b"`."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return dict(value)


def lookup(values: Mapping[str, Any], name: str) -> Any:
    """Return `values["a"]["b"]` for the dotted name `"a.b"`; KeyError if there is no such value."""
    for part in name.split("."):
        values = values[part]
    return values


def dotted_names(cls: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the names of a config's fields, and of nested configs' fields such as `pool.epochs`."""
    names = []
    for name, field in cls.model_fields.items():
        inner = _model(field.annotation)
        names += [prefix + name, *(dotted_names(inner, f"{prefix}{name}.") if inner else ())]
    return names


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; a later layer wins, mappings are merged key by key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = merge(merged[key], value) if both else value
    return merged


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List what differs between two nested mappings as `name: old -> new`, sorted by name."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += difference(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines


def takes(*configs: type[Config]) -> Callable[[F], F]:
    """Let a function's keyword arguments be the fields of configs: checked, and listed by `help`."""
    fields = {name: field for config in configs for name, field in config.model_fields.items()}
    names = sorted({name for config in configs for name in config.option_names()})

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        parameters = {k: p for k, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            for name in options:
                if name not in (*names, *parameters):
                    raise unknown(f"an option of ddray.{function.__name__}", name, names)
            return function(*arguments, **options)

        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.get_default())
            for name, field in fields.items()
            if name not in parameters
        ]
        lines = (f"    {name}: {' '.join(str(field.description).split())}" for name, field in fields.items())
        call.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Options:", *lines])
        call.__dict__["__signature__"] = signature.replace(parameters=[*parameters.values(), *options])
        return cast(F, call)

    return decorate

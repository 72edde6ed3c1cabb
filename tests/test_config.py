from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

import hypothesis
import pytest
from hypothesis import strategies as st
from pydantic import Field, model_validator

import ddray
from ddray.config import Config, added, difference, merge, nest, parse_overrides, read_yaml, yaml_of
from ddray.errors import InputError


class Inner(Config):
    lr_img: float = Field(default=1.0, gt=0)
    momentum: float = 0.5

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.momentum > self.lr_img:
            raise ValueError(f"momentum must be <= lr_img, got {self.momentum}")
        return self


class Outer(Config):
    steps: int = Field(default=3, ge=0)
    method: Inner = Inner()


names = st.sampled_from("abc")
leaves = st.integers(0, 3) | st.none() | st.lists(st.integers(0, 3), max_size=2)
nested = st.dictionaries(names, leaves | st.dictionaries(names, leaves, max_size=2), max_size=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 1}, "unknown option 'step'; did you mean 'steps'?"),
        ({"zzz": 1}, "unknown option 'zzz'; known: method, steps"),
        ({"method": {"lr_imgs": 1}}, "unknown option 'method.lr_imgs'; did you mean 'lr_img'?"),
        ({"steps": -1}, "steps: input should be greater than or equal to 0, got -1"),
        ({"method": {"lr_img": 0}}, "method.lr_img: input should be greater than 0, got 0"),
        ({"method": {"lr_img": float("nan")}}, "method.lr_img: input should be a finite number, got nan"),
        ({"method": {"momentum": float("inf")}}, "method.momentum: input should be a finite number, got inf"),
        ({"steps": "many"}, "steps: input should be a valid integer"),
        ({"method": {"momentum": 3}}, "method: momentum must be <= lr_img, got 3.0$"),
    ],
)
def test_a_bad_value_is_one_line_with_rule_value_and_fix(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Outer.parse(values)

    assert f"{caught.value}$".startswith(message)
    assert "\n" not in str(caught.value)


def test_prefix_and_source_are_named() -> None:
    with pytest.raises(InputError, match=r"unknown option 'method\.lr' \(in a\.yaml\)"):
        Inner.parse({"lr": 1}, prefix="method.", source="a.yaml")


def test_a_misspelt_name_is_said_before_the_field_that_is_missing_for_it() -> None:
    class Needed(Config):
        methods: tuple[int, ...]

    with pytest.raises(InputError, match="unknown option 'methds'; did you mean 'methods'"):
        Needed.parse({"methds": [1]})


def test_the_nearest_choice_and_the_nearest_name_within_a_list_are_said() -> None:
    class Wide(Config):
        kind: Literal["slow", "fast"] = "slow"
        inner: tuple[Inner, ...] = ()

    with pytest.raises(
        InputError, match=r"^kind: input should be 'slow' or 'fast', got 'slwo'; .* 'slow'\?$"
    ):
        Wide.parse({"kind": "slwo"})
    with pytest.raises(InputError, match=r"^unknown option 'inner\.0\.lr_imgs'; did you mean 'lr_img'\?$"):
        Wide.parse({"inner": [{"lr_imgs": 1}]})


def test_options_are_named_as_they_are_typed() -> None:
    class Options(Config):
        num_samples: int = Field(default=1, ge=1)

    with pytest.raises(InputError, match=r"^--num-samples: "):
        Options.parse({"num_samples": 0}, prefix="--")


def test_a_config_is_frozen_and_dumps_plain_values() -> None:
    config = Outer.parse({"method": {"lr_img": 2}})

    assert config.dump() == {"steps": 3, "method": {"lr_img": 2.0, "momentum": 0.5}}
    assert Outer.parse(config.dump()) == config
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-2E5", -2e5),
        (".5e1", 5.0),
        ("1.5e+2", 150.0),
        ("e3", "e3"),
        ("1e", "1e"),
        ("[1e-3, x]", [1e-3, "x"]),
        ("{a: 1e2}", {"a": 100.0}),
        ("1.", 1.0),
        ("-.inf", float("-inf")),
        ("true", True),
        ("False", False),
        ("3", 3),
        ("+20_000", 20_000),
        ("0x1F", 31),
        ("", None),
        ("~", None),
        ("null", None),
        ("None", "None"),
        *((word, word) for word in ("on", "off", "yes", "no", "On", "NO", "y", "'true'", "'3'")),
        # What YAML 1.1 takes for 8, 5420, 750, a date and 202401.
        ("010", 10),
        ("1:30:20", "1:30:20"),
        ("12:30", "12:30"),
        ("2024-01-05", "2024-01-05"),
        ("2024_01", "2024_01"),
        ("=", "="),
    ],
)
def test_overrides_read_values_as_yaml_1_2(text: str, value: Any) -> None:
    actual = parse_overrides([f"a={text}"])["a"]
    value = value.strip("'") if isinstance(value, str) else value

    assert actual == value
    assert type(actual) is type(value)


WORDS = ["08", "0912", "1e5", "12e45", "1.e5", "no", "0x1F", "1_000", "1:30", "~", "+12", "2024-01-05", "="]


@pytest.mark.parametrize("value", [*WORDS, "", 8, 1e5, 1e-5, True, None, [1e16, "1e16"], {"a": {"b": "1e5"}}])
def test_what_a_run_writes_is_read_as_it_was(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml_of({"a": value}))
    assert read_yaml(path) == {"a": value}


def test_every_word_that_a_setting_takes_is_read_as_that_word() -> None:
    for module in pkgutil.walk_packages(ddray.__path__, "ddray."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    words = {word for config in _subclasses(Config) for word in _words(config)}

    assert {"on", "off", "none", "auto"} <= words
    assert {word: parse_overrides([f"a={word}"])["a"] for word in words} == {word: word for word in words}


def _subclasses(cls: type) -> set[type]:
    return {sub for direct in cls.__subclasses__() for sub in {direct, *_subclasses(direct)}}


def _words(config: Any) -> set[str]:
    """Return the words that a field of `config` has as choices."""

    def choices(annotation: Any) -> set[str]:
        if get_origin(annotation) is Literal:
            return {choice for choice in get_args(annotation) if isinstance(choice, str)}
        return set().union(*map(choices, get_args(annotation)))

    return set().union(*(choices(field.annotation) for field in config.model_fields.values()))


@pytest.mark.parametrize(
    ("word", "flag"), [("on", True), ("off", False), ("yes", True), ("no", False), ("true", True)]
)
def test_a_word_is_what_its_setting_makes_of_it(word: str, flag: bool, tmp_path: Path) -> None:
    class Switches(Config):
        flag: bool | None = None
        choice: Literal["on", "off", "yes", "no"] = "on"
        name: str = ""

    (tmp_path / "a.yaml").write_text(f"flag: {word}\n")
    assert Switches.parse(read_yaml(tmp_path / "a.yaml")).flag is flag
    assert Switches.parse(parse_overrides([f"flag={word}"])).flag is flag
    if word != "true":
        switches = Switches.parse(parse_overrides([f"choice={word}", f"name={word}"]))
        assert (switches.choice, switches.name) == (word, word)


def test_overrides_nest_and_the_last_one_wins() -> None:
    overrides = parse_overrides(["steps=3", "method.lr_img=.1", "method.momentum=0", "steps=4", "a.b.c=x=y"])

    assert overrides == {"steps": 4, "method": {"lr_img": 0.1, "momentum": 0}, "a": {"b": {"c": "x=y"}}}


@pytest.mark.parametrize("pair", ["steps", "=3", "a..b=1", ".a=1", "a=[1", "a.=2"])
def test_a_malformed_override_is_refused(pair: str) -> None:
    with pytest.raises(InputError, match="--set"):
        parse_overrides([pair])


def test_read_yaml(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("steps: 1e2\nmethod: {lr_img: 1e-1, init: random}\n")
    assert read_yaml(path) == {"steps": 100.0, "method": {"lr_img": 0.1, "init": "random"}}
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}


@pytest.mark.parametrize("content", [b"[1, 2]", b"a: [", b"\xff\xfe\x00", b"just text", b"1: a"])
def test_a_file_that_is_no_mapping_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)

    with pytest.raises(InputError, match=r"config file must .*bad\.yaml"):
        read_yaml(path)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError, match="config file must be readable, got .*" + path.name):
            read_yaml(path)


@hypothesis.given(nested, nested, nested)
def test_of_merged_layers_the_later_wins_name_by_name_and_none_is_changed(a: Any, b: Any, c: Any) -> None:
    before = repr((a, b, c))
    merged = merge(a, b)

    assert merge(a, b, c) == merge(merged, c)
    assert merge(a, a) == merge(a) == merge({}, a) == a
    for key in {*a, *b}:
        both = isinstance(a.get(key), dict) and isinstance(b.get(key), dict)
        expected = {**a[key], **b[key]} if both else b.get(key, a.get(key))
        assert merged[key] == expected
    assert repr((a, b, c)) == before


@hypothesis.given(nested, nested)
def test_difference_is_empty_exactly_at_equality(a: Any, b: Any) -> None:
    assert difference(a, a) == []
    assert (difference(a, b) == []) == (a == b or not _unlike(a, b))


def _unlike(a: Any, b: Any) -> bool:
    """Whether two mappings differ beyond a missing key that is null in the other, or an empty mapping."""
    if isinstance(a, dict) and isinstance(b, dict):
        return any(_unlike(a.get(key), b.get(key)) for key in {*a, *b})
    return bool(a != b)


def test_difference_names_what_changed() -> None:
    old = {"steps": 3, "method": {"lr": 1, "p": 2}, "gone": True}
    new = {"steps": 4, "method": {"lr": 1, "p": 3}}

    assert difference(old, new) == ["gone: True -> None", "method.p: 2 -> 3", "steps: 3 -> 4"]


def test_nest() -> None:
    assert nest("a.b", 1) == {"a": {"b": 1}}
    assert nest("a", None) == {"a": None}


class TestDuplicateKeys:
    @pytest.mark.parametrize(
        ("text", "line", "key"),
        [
            ("steps: 3\nmethod: {}\nsteps: 4\n", 3, "steps"),
            ("method:\n  lr_img: 1\n  momentum: 0\n  'lr_img': 2\n", 4, "lr_img"),
            ("rows:\n- {name: dm, steps: 1, name: dc}\n", 2, "name"),
            ("<<: {a: 1}\nb: 1\nb: 1\n", 3, "b"),
            ("a: {1: x, 1: y}\n", 1, "1"),
        ],
    )
    def test_they_are_refused_with_line_and_name(
        self, text: str, line: int, key: str, tmp_path: Path
    ) -> None:
        (tmp_path / "a.yaml").write_text(text)

        with pytest.raises(
            InputError, match=rf"a\.yaml: line {line}: the key '{key}' is there twice; keep one"
        ):
            read_yaml(tmp_path / "a.yaml")

    def test_a_merged_key_may_be_overridden(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text(
            "base: &b {lr: 1, p: 2}\none: &o {<<: *b, lr: 3}\ntwo: {<<: *o, p: 4}\n"
        )

        values = read_yaml(tmp_path / "a.yaml")

        assert values["one"] == {"lr": 3, "p": 2}
        assert values["two"] == {"lr": 3, "p": 4}

    def test_an_option_is_yaml_too(self) -> None:
        with pytest.raises(InputError, match=r"--set method: .* the key 'lr_img' is there twice"):
            parse_overrides(["method={lr_img: 1, lr_img: 2}"])
        assert parse_overrides(["steps=3", "steps=4"]) == {"steps": 4}

    def test_no_module_reads_yaml_otherwise(self) -> None:
        root = Path(__file__).parents[1] / "ddray"
        readers = [path.name for path in root.rglob("*.py") if re.search(r"yaml\.\w*load", path.read_text())]

        assert readers == ["config.py"]


class Later(Config):
    """What a release has of `Inner`, with fields that came after it."""

    lr_img: float = 1.0
    crop: Literal["none", "fixed"] = added("none")
    count: int | None = added(None, ge=1)
    size: tuple[int, int] = (1, 2)


class Run(Config):
    method: Later = Later()


def test_fields_that_came_later_are_dumped_once_they_are_set() -> None:
    """A key is a hash of a dump: with every later field at its default it must be the key of before."""
    assert (
        Run().dump()
        == Run.parse({"method": {"crop": "none"}}).dump()
        == {"method": {"lr_img": 1.0, "size": [1, 2]}}
    )
    changed = Run.parse({"method": {"crop": "fixed", "count": 3}})
    assert changed.dump()["method"] == {"lr_img": 1.0, "crop": "fixed", "count": 3, "size": [1, 2]}
    assert Run.parse(changed.dump()) == changed
    assert Run().every_value() == {"method": {"lr_img": 1.0, "crop": "none", "count": None, "size": [1, 2]}}
    with pytest.raises(InputError, match=r"method\.count: input should be greater than or equal to 1, got 0"):
        Run.parse({"method": {"count": 0}})

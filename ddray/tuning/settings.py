"""What a search may vary: the settings of a run and of the protocol that scores its sets, by dotted name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from ddray.config import Config, dotted_names, lookup, merge, nest
from ddray.errors import InputError, unknown
from ddray.evaluation import get_protocol, target_protocols
from ddray.evaluation.options import EvaluateConfig, EvaluateOptions
from ddray.jobs.plan import Plan, RunConfig, budget_method
from ddray.methods import get_method
from ddray.tuning.options import TuneOptions


def protocol_for_sets(method: str) -> str:
    """Return the protocol that the kind of a method's sets calls for: `linear` for targets, else `hard`."""
    return "hard" if budget_method(method) is None else "linear"


def method_protocol(method: str) -> str:
    """Return the protocol that a method's authors score its sets by (`MethodConfig.protocol`)."""
    return getattr(get_method(method).config_type, "protocol", "") or protocol_for_sets(method)


def with_protocol(options: TuneOptions, method: str, before: Mapping[str, Any]) -> TuneOptions:
    """Return the options of a search with its protocol and teachers: by default the method's own protocol.

    `before` is the config.yaml of a search that is resumed, which keeps its own; empty if it is new.

    Raises:
        InputError: the protocol does not go with the method's sets, or with the teachers.
    """
    default = before.get("protocol", protocol_for_sets(method)) if before else method_protocol(method)
    protocol = options.protocol or default
    teachers = options.teachers or tuple(before.get("teachers", ()))
    EvaluateOptions.parse({"protocol": protocol, "teachers": teachers}, prefix="--")
    if budget_method(method) is not None and not get_protocol(protocol).trains_on_target:
        raise InputError(
            f"--protocol must be {target_protocols()} for {method}, whose sets hold targets and no labels, "
            f"got {protocol}"
        )
    return options.model_copy(update={"protocol": protocol, "teachers": teachers})


@dataclass(frozen=True)
class Settings:
    """The settings that every trial of a search starts from, and what a trial changes by name.

    Names are `lr_img` and `pool.epochs` of the method, `evaluate.lr` of the protocol, `arch` and `steps` of
    the run. A protocol with settings of its own (`soft`) has these under `evaluate`, in place of the run's.

    Attributes:
        method: its name.
        config: the run's resolved configuration as plain values.
        protocol: what scores the sets.
        scoring: what is set of the protocol's own settings; None if `evaluate` are the run's.
    """

    method: str
    config: Mapping[str, Any]
    protocol: str = "hard"
    scoring: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, plan: Plan, protocol: str) -> Self:
        """Return the settings of a plan."""
        is_separate = get_protocol(protocol).config_type is not EvaluateConfig
        return cls(
            plan.method, plan.config.dump(), protocol, dict(plan.scoring or {}) if is_separate else None
        )

    @property
    def _method_type(self) -> type[Config]:
        return get_method(self.method).config_type

    def names(self) -> list[str]:
        """Return the names of all settings."""
        run = [name for name in RunConfig.model_fields if name not in ("evaluate", "method")]
        protocol = dotted_names(get_protocol(self.protocol).config_type, "evaluate.")
        names = [*dotted_names(self._method_type), *run, *protocol]
        return [name for name in names if name != "evaluate.every"]  # searches keep no sets along the steps

    def check_name(self, name: str, where: str) -> None:
        """Refuse a name that no setting has with the nearest of the same section: InputError."""
        names = self.names()
        if name in getattr(self._method_type, "decide_defaults", ()):
            raise InputError(
                f"{where} can't be {name}, which other defaults depend on; search once for each of its "
                f"values: --set method.{name}=VALUE"
            )
        if name not in names:
            part = name.partition(".")[0] + "."
            near = [one for one in names if one.startswith(part)] or [one for one in names if "." not in one]
            raise unknown(where, name, near)

    def path(self, name: str) -> str:
        """Return where a setting stands in the run's configuration."""
        first = name.partition(".")[0]
        of_run = first in RunConfig.model_fields and first not in self._method_type.model_fields
        return name if of_run else f"method.{name}"

    def configs(
        self, params: Mapping[str, Any], source: str = ""
    ) -> tuple[RunConfig[Any], dict[str, Any] | None]:
        """Return the configuration of a run with `params`, and what is set of the protocol's own settings.

        InputError if a value breaks its setting's rule.
        """
        changes = merge(*(nest(self.path(name), value) for name, value in params.items()))
        scoring = None
        if self.scoring is not None:
            scoring = merge(self.scoring, changes.pop("evaluate", {}))
            self._parsed_scoring(scoring, source)
        config_type = RunConfig[self._method_type]  # type: ignore[name-defined]
        return config_type.parse(merge(self.config, changes), source=source), scoring

    def dump(self, params: Mapping[str, Any], source: str = "") -> dict[str, Any]:
        """Return the whole configuration with `params` as plain values; `evaluate` is the protocol's.

        InputError as for `configs`.
        """
        config, scoring = self.configs(params, source)
        return (
            config.dump()
            if scoring is None
            else {**config.dump(), "evaluate": self._parsed_scoring(scoring).dump()}
        )

    def apply(self, plan: Plan, params: Mapping[str, Any], source: str = "") -> Plan:
        """Return a plan with `params`; InputError as for `configs`."""
        config, scoring = self.configs(params, source)
        return replace(plan, config=config, scoring=scoring)

    def values(self, names: Iterable[str], params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return settings of a run with `params` (default: of the preset) by name, as plain values."""
        config, scoring = self.configs(params or {})
        everything = config.every_value()
        if scoring is not None:
            everything["evaluate"] = self._parsed_scoring(scoring).every_value()
        return {name: lookup(everything, self.path(name)) for name in names}

    def is_preset(self, name: str, value: Any) -> bool:
        """Return whether a setting that a run names has the preset's value."""
        preset = self.values([name])[name]
        return bool(merge(preset, value) == preset if isinstance(value, Mapping) else value == preset)

    def _parsed_scoring(self, scoring: Mapping[str, Any], source: str = "") -> Config:
        """Return the protocol's own settings."""
        try:
            return get_protocol(self.protocol).config_type.parse(scoring, prefix="evaluate.", source=source)
        except InputError as error:
            raise InputError(
                f"{error} (evaluate holds the settings of --protocol {self.protocol})"
            ) from error

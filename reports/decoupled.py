"""Decoupled, relational and generative systems at a size that two cores bear: `python -m reports.decoupled`.

Writes decoupled.md. DWA's parts are added one by one, ESFR stands beside its base at equal steps, minimax
beside its off switch, generators beside random real images. Soft rows share one recipe, RD3's, and a teacher.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Final, Literal

from reports.scale.lab import Lab, ddray, environments, figures_table, opened, percent, run_parts, typed

_RECORD: Final = Path(__file__).resolve().parent / "decoupled.jsonl"
_NET: Final = "convnet3_w64"
_MEASURES: Final = ("cosine_within_class", "cosine_to_real", "generator_epochs", "storage_floats")
_HARD: Final = ("--arch", _NET, "--seeds", 3, "--epochs", 300, "--augment", "dsa")
_SOFT: Final = (
    *("--protocol", "soft", "--recipe", "rd3"),
    *("--teacher", f"{_NET}_bn", "--arch", _NET, "--seeds", 3),
)


@dataclass(frozen=True)
class Figure:
    """What is distilled, once per seed: arguments of the command, and those that make it brief."""

    distil: Sequence[object]
    brief: Sequence[object] = ()


@dataclass(frozen=True)
class Part:
    """Figures, how each one's sets are scored, and which figures are compared.

    Attributes:
        figures: by name.
        scores: arguments of `ddray evaluate` by the score's name.
        compared: each figure with the one before, with the last one, or with all that follow.
    """

    figures: Mapping[str, Figure]
    scores: Mapping[str, Sequence[object]]
    compared: Literal["before", "last", "all"] = "last"

    def pairs(self) -> list[tuple[str, str]]:
        """Return the names of figures to compare, the second one as the base."""
        names = [*self.figures]
        if self.compared == "before":
            return [(after, before) for before, after in pairwise(names)]
        if self.compared == "all":
            return list(combinations(names, 2))
        return [(name, names[-1]) for name in names[:-1]]


def _method(*settings: str) -> tuple[str, ...]:
    return tuple(word for setting in settings for word in ("--set", f"method.{setting}"))


def _recovered(name: str, dataset: str, steps: int, *settings: str) -> Figure:
    """Return a method that recovers images, from one teacher, at the rates of DWA's code."""
    teacher = (f"teacher_arch={_NET}_bn", "lr=0.25", "bn_weight=0.01")
    arguments = ("--method", name, "--dataset", dataset, "--ipc", 10, "--steps", steps)
    return Figure((*arguments, *_method(*teacher, *settings)), ("--steps", 20, *_method("teacher_epochs=2")))


_OF_DIGITS: Final = "teacher_epochs=20"
_CURRICULUM: Final = ("cifar10", 1000, "teacher_epochs=5")


def _related(dataset: str, *settings: str) -> dict[str, Figure]:
    """Return ESFR and its base, DM, which is ESFR with weights of 0."""
    arguments = ("--method", "esfr", "--dataset", dataset, "--ipc", 10, "--steps", 200)
    arguments = (
        *arguments,
        "--set",
        f"arch={_NET}",
        *_method(f"pool.arch={_NET}", "pool.num_models=3", *settings),
    )
    brief = ("--steps", 2, *_method("pool.num_models=1", "pool.epochs=1"))
    base = (*arguments, *_method("lambda_cc=0", "lambda_cm=0"))
    return {"esfr": Figure(arguments, brief), "its base, dm": Figure(base, ("--steps", 2))}


def _generated(method: str, *brief: str) -> Figure:
    return Figure(("--method", method, "--dataset", "digits", "--ipc", 10), _method(*brief))


_DIFFUSION: Final = ("generator.epochs=1", "generator.vae_epochs=1")
_RANDOM: Final = _generated("random")

PARTS: Final[Mapping[str, Part]] = {
    "dwa_digits": Part(
        {
            "sre2l": _recovered("sre2l", "digits", 300, _OF_DIGITS),
            "sre2l, real start": _recovered("sre2l", "digits", 300, _OF_DIGITS, "init=random"),
            "sre2l, real start, r_var": _recovered(
                "sre2l", "digits", 300, _OF_DIGITS, "init=random", "r_var=11"
            ),
            "dwa": _recovered("dwa", "digits", 3000, _OF_DIGITS),  # 300 for each of the ten images of a class
        },
        {"soft": _SOFT},
        compared="before",
    ),
    "curriculum_cifar10": Part(
        {
            "sre2l, crop=none": _recovered("sre2l", *_CURRICULUM),
            "sre2l, crop=fixed": _recovered("sre2l", *_CURRICULUM, "crop=fixed"),
            "sre2l, crop=cosine": _recovered("sre2l", *_CURRICULUM, "crop=cosine"),
        },
        {"soft": _SOFT},
        compared="before",
    ),
    "esfr_digits": Part(_related("digits", "pool.epochs=20", "batch_real=32"), {"hard": _HARD}),
    "esfr_mnist": Part(_related("mnist", "pool.epochs=1", "batch_real=64"), {"hard": _HARD}),
    "diffusion_digits": Part(
        {
            "minimax": _generated("minimax", *_DIFFUSION, "finetune.epochs=1"),
            "dit": _generated("dit", *_DIFFUSION),
            "random": _RANDOM,
        },
        {"hard": _HARD, "soft": _SOFT},
        compared="all",
    ),
    "generators_digits": Part(
        {
            **{name: _generated(name, "generator.epochs=1") for name in ("gmmn", "cgan", "biggan", "dc_vae")},
            "random": _RANDOM,
        },
        {"hard": _HARD},
    ),
}


def measure(lab: Lab, part: str, figure: str) -> None:
    """Distil a figure's sets, one per seed, score them, and record it."""
    what, scores = PARTS[part].figures[figure], PARTS[part].scores
    name = f"{part}-{figure}".replace(", ", "-").replace(" ", "-").replace("=", "-")
    runs = [_run(lab, f"{name}-{seed}", what, scores, seed) for seed in range(lab.repeats)]
    commands = [
        ("distill", *what.distil, "--seed", "0.."),
        *(("evaluate", "SET", *of) for of in scores.values()),
    ]
    lab.record(part, figure, "; ".join(map(typed, commands)), runs)


def _run(
    lab: Lab, name: str, figure: Figure, scores: Mapping[str, Sequence[object]], seed: int
) -> dict[str, Any]:
    """Return a set's accuracy under each score, its own measures, the teacher's accuracy, and seconds."""
    folder = lab.folder / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)  # of a start that was killed
    brief = figure.brief if lab.is_tiny else ()
    ran = ddray(lab, "distill", *figure.distil, *brief, "--seed", seed, "--run-dir", folder)
    quick = ("--epochs", 2) if lab.is_tiny else ()
    scored = {
        score: ddray(lab, "evaluate", ran.out["artifact"], *arguments, *quick).out
        for score, arguments in scores.items()
    }
    accuracies = {score: float(out["results"][0]["accuracy_mean"]) for score, out in scored.items()}
    measures = {name: ran.out[name] for name in _MEASURES if name in ran.out}
    if "soft" in scored:
        measures["teacher"] = scored["soft"]["teacher"]["accuracy"]
    return {**accuracies, **measures, "seconds": ran.seconds, "seed": seed}


def verdict(measured: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """Return a line for each comparison whose figures are there: the gain, and over which seeds it holds."""
    lines = []
    for name, part in PARTS.items():
        for score in part.scores:
            for figure, base in part.pairs():
                if (name, figure) in measured and (name, base) in measured:
                    ours, theirs = (measured[name, each]["runs"] for each in (figure, base))
                    gains = [100 * (a[score] - b[score]) for a, b in zip(ours, theirs, strict=True)]
                    above = sum(gain > 0 for gain in gains)
                    lines.append(
                        f"{name}, {score}: {figure} is {statistics.fmean(gains):+.1f} points from {base}, "
                        f"above it with {above} of {len(gains)} seeds"
                    )
    return lines


def page(measured: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """Return the lines of decoupled.md."""
    lines = [
        *("# Measured: decoupled, relational and generative systems", ""),
        "Written by `python -m reports.decoupled`; do not edit. Test accuracies, means +- sample standard",
        "deviation over n sets; seconds are of distilling each set, with pool networks and generators where",
        "it was the first to need them. Soft rows share one recipe, `rd3`, and one teacher; they say nothing",
        "about published numbers, which are of other datasets, networks and recipes. `crop=cosine` is sre2l",
        "with CDA's curriculum, not CDA.",
        "",
    ]
    scores = {score: partial(percent, name=score) for score in ("hard", "soft")}
    lines += [*(f"- {line}" for line in verdict(measured)), ""]
    lines += figures_table(measured, {**scores, "also": _measures})
    return [*lines, "", *(f"- {line}" for line in environments(measured)), ""]


def _measures(row: Mapping[str, Any]) -> str:
    """Return the teacher's accuracy and what the method measured itself."""
    names = [name for name in ("teacher", *_MEASURES) if name in row["mean"]]
    return ", ".join(f"{name.replace('_', ' ')} {row['mean'][name]:.4g}" for name in names)


def main() -> None:
    """Measure the parts that are named, or all, but for what is recorded."""
    lab, parts = opened("decoupled", __doc__, _RECORD, list(PARTS))
    run_parts(lab, {part: PARTS[part].figures for part in parts}, measure, verdict, page)


if __name__ == "__main__":
    main()

"""What looks wrong in a table is said, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from ddray.tables.anomalies import anomalies


def cell(method: str, mean: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "method": method,
        "dataset": "digits",
        "ipc": 1,
        "protocol": "hard",
        "arch": "convnet3",
        "accuracy_mean": mean,
        "accuracy_std": 0.01,
        "n": 5,
        "standard_error": 0.005,
        **changes,
    }


@pytest.mark.parametrize(
    ("cells", "sentences"),
    [
        ([cell("random", 0.3), cell("dm", 0.5), cell("dc", 0.45)], []),
        (
            [cell("random", 0.3), cell("dm", 0.28), cell("dc", 0.295)],
            [
                "dm is below random on digits (hard, convnet3) at ipc 1: 28.00 +- 1.00 % against "
                "30.00 +- 1.00 %.",
                "dc is below random on digits (hard, convnet3) at ipc 1: 29.50 +- 1.00 % against "
                "30.00 +- 1.00 %, within two standard errors.",
            ],
        ),
        ([cell("random", 0.3, arch="resnet18"), cell("dm", 0.28)], []),
        (
            [cell("dm", 0.5), cell("dm", 0.42, ipc=10), cell("dm", 0.6, ipc=50)],
            [
                "dm falls from ipc 1 to ipc 10 on digits (hard, convnet3): 50.00 +- 1.00 % to "
                "42.00 +- 1.00 %.",
            ],
        ),
        ([cell("dm", 0.5), cell("dm", 0.42, ipc=10, teacher="resnet18")], []),
        ([cell("dm", 0.5), cell("dm", 0.42, ipc=None, budget=20)], []),
        (
            [cell("dm", 0.5), cell("dc", 0.5), cell("dsa", 0.5), cell("idm", 0.6)],
            ["dm, dc and dsa tie on digits (hard, convnet3) at ipc 1: each scores 50.00 %."],
        ),
        (
            [cell("dm", 0.5, accuracy_std=0.0)],
            ["dm has no spread on digits (hard, convnet3) at ipc 1: all 5 networks score 50.00 +- 0.00 %."],
        ),
        ([cell("dm", 0.5, accuracy_std=None, n=1)], []),
        ([cell("random", None), cell("dm", 0.1)], []),
        ([cell("random", 0.9, protocol="nas"), cell("dm", 0.8, protocol="nas")], []),
        (
            [cell("random_ssl", 0.3, ipc=None, budget=20), cell("krr_st", 0.2, ipc=None, budget=20)],
            [
                "krr_st is below random_ssl on digits (hard, convnet3) at 20 images: 20.00 +- 1.00 % against "
                "30.00 +- 1.00 %."
            ],
        ),
    ],
)
def test_a_sentence_for_each(cells: list[dict[str, Any]], sentences: list[str]) -> None:
    assert anomalies(cells) == sentences


def test_errors_that_are_unknown_make_no_claim() -> None:
    (sentence,) = anomalies([cell("random", 0.3, standard_error=None), cell("dm", 0.299)])
    assert sentence.endswith("29.90 +- 1.00 % against 30.00 +- 1.00 %.")

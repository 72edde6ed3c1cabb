"""Which settings mattered in a search, as far as its trials can say: fANOVA over several seeds."""

import statistics
import textwrap
from typing import Any, Final, NamedTuple

from optuna.trial import TrialState

MIN_TRIALS: Final = 10
"""Complete trials from which importances are shown."""
NUM_SEEDS: Final = 5
_LINE: Final = 56  # characters of a line that a phone shows whole
CAVEAT: Final = (
    "Importances say what moved the val score of these trials, within these ranges; few trials, and trials "
    "that a search has drawn near its best, make them uncertain. Trials that were stopped early don't count."
)


class Importance(NamedTuple):
    """Share of the score's variance that a setting explains: mean and deviation over fANOVA's seeds."""

    mean: float
    std: float


def importances(study: Any) -> dict[str, Importance]:
    """Return importances by setting, the largest first.

    Raises:
        ValueError: there are too few complete trials, or nothing varies in them.
    """
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    num = num_complete(study)
    if num < MIN_TRIALS:
        raise ValueError(f"importances need at least {MIN_TRIALS} complete trials; this search has {num}")
    draws = [
        get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=seed))
        for seed in range(NUM_SEEDS)
    ]
    by_name = {name: [draw[name] for draw in draws] for name in draws[0]}
    spread = {
        name: Importance(statistics.fmean(values), statistics.stdev(values))
        for name, values in by_name.items()
    }
    return dict(sorted(spread.items(), key=lambda item: -item[1].mean))


def num_complete(study: Any) -> int:
    """Return how many trials of a study were complete."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def importance_plot(study: Any) -> Any:
    """Return plotly's bars of the importances, with their spread and what they do not say.

    Raises:
        ValueError: as for `importances`.
    """
    import plotly.graph_objects as go

    by_name = dict(reversed(importances(study).items()))  # plotly begins at the bottom
    figure = go.Figure(
        go.Bar(
            x=[100 * one.mean for one in by_name.values()],
            y=list(by_name),
            error_x={"array": [100 * one.std for one in by_name.values()]},
            orientation="h",
        )
    )
    text = f"importance (%): mean and standard deviation over {NUM_SEEDS} seeds of fANOVA"
    title = [f"{text}, {num_complete(study)} complete trials", CAVEAT]
    lines = (line for part in title for line in textwrap.wrap(part, _LINE))
    figure.update_layout(xaxis_title="<br>".join(lines))
    return figure

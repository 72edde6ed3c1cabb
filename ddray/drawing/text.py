"""Numbers as people read them."""


def percent(mean: object, std: float | None = None, *, digits: int = 2) -> str:
    """Return a fraction as `12.34` or `12.34 +- 0.56` (percent); `-` if it is no number."""
    if not isinstance(mean, int | float):
        return "-"
    return f"{100 * mean:.{digits}f}" + ("" if std is None else f" +- {100 * std:.{digits}f}")


def percent_short(mean: object, std: float | None = None) -> str:
    """Return a fraction as papers' tables do, `12.3` or `12.3 \u00b1 0.6` (percent)."""
    return percent(mean, std, digits=1).replace("+-", "\u00b1")

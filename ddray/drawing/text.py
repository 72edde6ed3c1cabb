"""Numbers as people read them."""


def percent(mean: object, std: float | None = None) -> str:
    """Return a fraction as `12.34` or `12.34 +- 0.56` (percent); `-` if it is no number."""
    if not isinstance(mean, int | float):
        return "-"
    return f"{100 * mean:.2f}" + ("" if std is None else f" +- {100 * std:.2f}")

"""`x_syn.pt` beside `y_syn.pt`: KRR-ST's representations, and the labels of the sets it compares with."""

from pathlib import Path
from typing import Any, Final

from ddray.artifact.foreign import ForeignFile, ForeignFormat, ForeignRequest, ForeignSet
from ddray.artifact.foreign.tensor_pairs import beside, classes_of, is_tensor, read_labels
from ddray.data.pixels import normalized_space

_PRETRAINING: Final = {
    **{"epochs": 1000, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "batch": 256},
    **{"schedule": "constant", "augment": "none"},
}


def _read(path: Path, contents: Any, request: ForeignRequest) -> ForeignFile:
    # Its images start as pixels in 0..1, and real ones are normalised for the networks trained on them.
    space, labels_file = normalized_space(request.dataset), beside(path, "x_syn", "y_syn")
    labels = read_labels(labels_file).detach()
    if labels.ndim == 2 and labels.shape[1] != request.dataset.num_classes:
        facts = {"budget": len(labels), "config": {"evaluate": _PRETRAINING}}
        return ForeignFile([ForeignSet(contents, labels, are_targets=True, space=space, facts=facts)])
    if labels.ndim == 2:  # KIP's and FRePo's
        labels = classes_of(labels_file, labels)
    return ForeignFile([ForeignSet(contents, labels, space=space)])


FORMAT: Final = ForeignFormat(
    "x_syn.pt beside y_syn.pt (KRR-ST)",
    lambda path, contents: is_tensor(path, contents, start="x_syn"),
    _read,
)

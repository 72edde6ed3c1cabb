"""ddray: hyperparameter and NAS benchmarking for dataset distillation, on Ray."""

__version__ = "0.1.0"

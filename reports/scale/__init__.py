"""Shards, evaluation on workers and data on the disk, measured: `python -m reports.scale` (docs/scale.md)."""

"""The only package that imports Ray: runtime, tuning, and the fan-out of units over a cluster."""

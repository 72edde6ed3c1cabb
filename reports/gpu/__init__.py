"""What only a GPU can show, measured by one command within minutes: `make gpu` (docs/gpu.md)."""

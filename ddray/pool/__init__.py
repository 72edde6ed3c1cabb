"""The model pool: specs, files, the local pool."""

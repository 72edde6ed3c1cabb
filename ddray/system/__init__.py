"""The machine: files, tensors on disk, memory, progress, worker set-up."""

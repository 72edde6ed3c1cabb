"""Neural architecture search on distilled sets: spaces of architectures, training, truth and ranking."""

"""Distilled sets: the set, its storage modes, files of ours and of other projects."""

"""Wiring, the training loop, evaluation and progress: what turns settings into a run (floor 8)."""

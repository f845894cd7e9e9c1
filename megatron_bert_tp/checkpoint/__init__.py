"""Checkpoints without a layout: any tensor x pipeline x data sizes save them, and any load them (floor 4)."""

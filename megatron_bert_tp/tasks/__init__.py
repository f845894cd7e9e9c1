"""Tasks with labels: reading their files, features, metrics, predictions (floor 7)."""

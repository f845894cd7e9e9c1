"""What a model is trained for, as sums over global counts (floor 4)."""

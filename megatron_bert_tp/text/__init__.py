"""Text to rows of token ids, for prediction and tasks (floor 6)."""

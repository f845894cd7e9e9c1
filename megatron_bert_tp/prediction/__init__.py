"""Text in, answers out, with a model of any class (floor 7)."""

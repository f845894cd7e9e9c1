"""How weights move: learning rates and optimizers (floor 4)."""

"""Foreign weight files: Hugging Face directories in and out, and whatever `model.weights` may name (floor 5)."""

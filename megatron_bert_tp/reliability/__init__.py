"""What keeps a run from hanging, colliding and ending without a word (floor 7)."""

"""The sharded MegatronBert: embeddings, layers, heads, and the stage that holds a part of them (floor 3)."""

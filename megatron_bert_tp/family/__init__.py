"""Hugging Face's nine classes of MegatronBert, whole or sharded over the tensor axis (floor 6)."""

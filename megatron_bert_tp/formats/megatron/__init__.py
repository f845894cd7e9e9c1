"""Megatron-LM checkpoints, NVIDIA's 345M downloads among them: read without trust, and written."""

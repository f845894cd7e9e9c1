"""Tensor- and pipeline-parallel training of MegatronBert, from and to Hugging Face weights."""

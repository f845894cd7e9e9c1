"""Tests of the Triton kernels; `test_triton_kernels` runs them, in Triton's interpreter and on a GPU."""

"""Measuring kernels: on a GPU, and without one by what can be counted in the compiled code."""

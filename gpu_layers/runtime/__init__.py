"""Finding, compiling, caching and launching kernels."""

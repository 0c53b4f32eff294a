"""What the reference and the kernels both need: windows, masks, moments, dtypes, Philox, the GPU of the plans."""

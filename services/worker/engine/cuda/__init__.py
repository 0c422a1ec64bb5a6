"""The decoder for CUDA devices: Triton kernels, one flat arena of weights, CUDA graphs for decoding steps."""

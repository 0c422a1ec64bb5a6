"""The decoder for CPUs in C: packed weights, paged attention, int8 with a scale for each 64 inputs of a row."""

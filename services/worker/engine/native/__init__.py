"""The decoder for CPUs in C: packed weights, paged attention, int8 with a scale for each 32 inputs of a row."""

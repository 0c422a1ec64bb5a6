"""The GPU worker: pulls jobs from its resource's queues, swaps models, generates, streams back."""

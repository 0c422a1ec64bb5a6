"""The scheduler: resources, their places, and the workers on them."""

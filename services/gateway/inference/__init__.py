"""Inference over HTTP: bodies in, jobs to the owner, answers and streams out. Called by the gateway's edge through `http.routes`."""

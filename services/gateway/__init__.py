"""The HTTP door: OpenAI-compatible API, per-model URLs, management API, and the owner of live jobs."""

"""The error that handlers raise, by the name that the gateway's modules know it by; `edge.py` gives it its shape."""

from shared.inference.errors import ApiError, bad_request, error_type, must_not_retry

__all__ = ["ApiError", "bad_request", "error_type", "must_not_retry"]

"""Runs the whole system on one machine without Docker: set-up, private servers, supervision.

`bootstrap.py` and what it imports (`failures.py`, `progress.py`) use the standard library only and run under the
system's Python; everything else may use the virtual environment. The services know nothing of this package.
"""

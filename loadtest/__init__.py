"""Measures and checks a running Roundhouse from outside: `python -m loadtest.NAME`."""

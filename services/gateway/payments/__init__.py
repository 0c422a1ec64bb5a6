"""The payment provider: its page, its API, and the events that it reports."""

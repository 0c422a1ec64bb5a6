"""The `roundhouse` command: a client of the public HTTP API and nothing else. One module per group of commands."""

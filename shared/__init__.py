"""Contracts and plumbing that every service uses: messages, topology, broker, settings, telemetry, runtime.

Nothing here takes a business decision for one service, and nothing here imports from `services/`.
"""

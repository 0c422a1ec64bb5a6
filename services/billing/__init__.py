"""Billing: keeps raw usage facts, settles them into requests, and posts charges to a double-entry ledger."""

"""Batches over AMQP: users and names in the teams' vhost, taking of what teams publish, and telling of results."""

"""The node agent: one per host, parent of its workers; hands out devices and says when a process is really gone."""

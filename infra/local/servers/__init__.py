"""The three servers as private ones: how each is prepared, started, probed and stopped. One module per server.

Each offers `Private<Server>`: a value with the folder, ports and password, its URL(s) and its process specification(s).
"""

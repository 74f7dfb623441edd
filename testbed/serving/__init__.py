"""In which order a server answers requests, one discipline a file; `server.py` is the server."""

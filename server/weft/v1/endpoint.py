"""Where a server listens unless it is told otherwise, and where a client looks for it."""

HOST = "127.0.0.1"
PORT = 50051
DEFAULT_SERVER = f"{HOST}:{PORT}"

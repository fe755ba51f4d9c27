"""Default address of a server, for servers and clients."""

HOST = "127.0.0.1"
PORT = 50051
DEFAULT_SERVER = f"{HOST}:{PORT}"

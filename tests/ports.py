"""A port for processes that have to find each other."""

import socket


def free_port() -> str:
    """One that nobody on this machine listens to, as text for MASTER_PORT."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return str(unused.getsockname()[1])

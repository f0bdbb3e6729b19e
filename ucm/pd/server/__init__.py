"""The proxy as a server: its sockets and its connections."""

"""The operators' side of the server, on a listener of its own with credentials of its own."""

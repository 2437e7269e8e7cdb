"""`deshift verify`: does steering really do here what it says?

A model directory is looked at in this process (local.py), a server only over HTTP (remote.py).
"""

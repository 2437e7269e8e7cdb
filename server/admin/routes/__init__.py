"""The paths under /admin/v1, one file a subject; they only translate to server/control.py."""

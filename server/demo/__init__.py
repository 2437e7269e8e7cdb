"""What `deshift demo` shows, and the photograph that ships with Deshift.

Does not cover the demonstration model itself (steering/demo).
"""

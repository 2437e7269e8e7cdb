"""The method: CMRM shift vectors and their subtraction. Knows nothing of HTTP."""

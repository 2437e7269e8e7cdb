"""What operators do: see control.py."""

from server.control.control import Control, activate
from server.control.keys import KEY_START, MAX_KEYS, NewKey, key_digest
from server.control.state import StoreState, TenantState
from server.control.trail import MAX_REASON_LEN, AuditEntry, Author, DocumentChange, Via

__all__ = [
    "KEY_START",
    "MAX_KEYS",
    "MAX_REASON_LEN",
    "AuditEntry",
    "Author",
    "Control",
    "DocumentChange",
    "NewKey",
    "StoreState",
    "TenantState",
    "Via",
    "activate",
    "key_digest",
]

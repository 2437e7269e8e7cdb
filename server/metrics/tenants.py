"""Which tenants have a label of their own: those that are configured, up to a bound."""

from collections.abc import KeysView

from server.directory import TenantDirectory
from server.documents import DEFAULT_TENANT

OTHER = "other"  # everybody else: unknown keys, deleted tenants, those beyond the bound


class TenantLabels:
    """First come, first served, and kept until the tenant is deleted, so that no request of a
    tenant goes back to `other`. The default tenant has a label beside the bound; a tenant that is
    named `other` has none. Event loop only.
    """

    def __init__(self, directory: TenantDirectory, limit: int) -> None:
        self._directory = directory
        self._limit = limit
        self._own: dict[str, None] = {DEFAULT_TENANT: None}

    def label(self, tenant: str | None) -> str:
        if tenant is None:
            return OTHER
        if tenant in self._directory.tenants:
            self._admit(tenant)
        return tenant if tenant in self._own else OTHER

    @property
    def own(self) -> KeysView[str]:
        return self._own.keys()

    def refresh(self) -> set[str]:
        """Give labels to configured tenants without traffic, too; returns those that are gone."""
        tenants = self._directory.tenants
        gone = self._own.keys() - tenants - {DEFAULT_TENANT}
        for tenant in gone:
            del self._own[tenant]
        for tenant in sorted(tenants - self._own.keys()):
            self._admit(tenant)
        return gone

    def _admit(self, tenant: str) -> None:
        if tenant != OTHER and len(self._own) <= self._limit:  # the default tenant is one more
            self._own.setdefault(tenant)

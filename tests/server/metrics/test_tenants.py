"""Which tenants have a label of their own."""

from server.directory import TenantDirectory
from server.documents import PolicyFields, TenantDocument, text_of
from server.metrics.tenants import TenantLabels
from steering.stores.base import Changes, Document


def directory_of(*tenants: str) -> TenantDirectory:
    directory = TenantDirectory(PolicyFields())
    put(directory, *tenants)
    return directory


def put(directory: TenantDirectory, *tenants: str) -> None:
    text = text_of(TenantDocument(policy=PolicyFields()))
    documents = tuple(Document(f"tenant/{name}", text, 1) for name in tenants)
    directory.apply(Changes("e", 1, documents), is_whole=True)


def test_configured_tenants_have_their_names_and_everybody_else_is_other() -> None:
    labels = TenantLabels(directory_of("a", "b"), 10)
    told = [labels.label(name) for name in ("a", "b", "default", "nobody", None)]
    assert told == ["a", "b", "default", "other", "other"]


def test_the_bound_holds_and_who_came_first_keeps_the_label() -> None:
    labels = TenantLabels(directory_of("a", "b", "c"), 2)
    assert [labels.label(name) for name in ("c", "b", "a", "default")] == [
        *("c", "b", "other", "default")
    ]
    assert labels.refresh() == set()
    assert set(labels.own) == {"default", "b", "c"}


def test_a_scrape_finds_tenants_without_traffic_in_the_order_of_their_names() -> None:
    labels = TenantLabels(directory_of("b", "c", "a"), 2)
    labels.refresh()
    assert set(labels.own) == {"default", "a", "b"}


def test_a_deleted_tenant_gives_its_place_to_the_next() -> None:
    directory = directory_of("a", "b")
    labels = TenantLabels(directory, 1)
    labels.refresh()
    assert set(labels.own) == {"default", "a"}
    put(directory, "b")
    assert labels.refresh() == {"a"}
    assert set(labels.own) == {"default", "b"}
    assert labels.label("a") == "other"


def test_no_room_at_all_leaves_the_default_tenant() -> None:
    labels = TenantLabels(directory_of("a"), 0)
    assert (labels.label("a"), labels.label("default")) == ("other", "default")


def test_a_tenant_that_is_named_other_counts_among_the_others() -> None:
    """Else its end would take away what the others have counted."""
    directory = directory_of("other")
    labels = TenantLabels(directory, 5)
    assert labels.label("other") == "other"
    put(directory)
    assert labels.refresh() == set()

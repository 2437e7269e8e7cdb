"""The console in a real Chromium, over a real socket, as an operator uses it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from server.console.routes import FILES
from tests.server.conftest import wait_until
from tests.server.console.conftest import CHROMIUM, KEY, Console
from tests.server.fakes import image_bytes, make_vectors, says

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
XSS = "<img src=x onerror=alert(1)><script>alert(2)</script>"
PAGES = ("/", "/new-tenant", "/tenants/acme", "/vectors", "/audit", "/tenants/nobody")
REFRESH_MS = 3000  # as in console.js
Opened = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for all of these tests, and no longer: while it lives this thread has a running event
    loop, with which no asynchronous test could start its own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Browser, console: Console) -> Iterator[Opened]:
    """A page of a browser of its own, signed in; anything that the browser complains of fails.

    By hand only where signing in is what the test is about.
    """
    contexts, complaints = [], []

    def complain(message: ConsoleMessage) -> None:
        # Chromium reports every answer from 400 on; that these come is what some tests are about.
        if message.type in ("error", "warning") and "the server responded" not in message.text:
            complaints.append(message.text)

    def open_page(path: str = "/", width: int = 1280, **options: Any) -> Page:
        context = browser.new_context(
            base_url=console.url, viewport={"width": width, "height": 800}, **options
        )
        contexts.append(context)
        context.set_default_timeout(5000)
        page = context.new_page()
        page.on("console", complain)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        if path != "/sign-in":
            context.request.post("/sign-in", form={"key": KEY}, max_redirects=0)
        page.goto(path)
        if path != "/sign-in":
            expect(page.get_by_text("alice")).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def with_clock(page: Page) -> Page:
    """The page anew, with a clock that `renew` can put forward."""
    page.clock.install()
    page.reload()
    return page


def renew(page: Page) -> None:
    """Let the time of the page's next refresh come."""
    page.clock.fast_forward(REFRESH_MS)


def save(page: Page, reason: str = "because") -> None:
    page.locator("#policy-reason").fill(reason)
    page.get_by_role("button", name="Save").click()


def test_a_wrong_key_does_not_sign_in(opened: Opened) -> None:
    page = opened("/sign-in")
    page.get_by_label("Operator key").fill("operator-key-of-nobody")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("this is no admin key")
    page.get_by_label("Operator key").fill(KEY)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Fleet")).to_be_visible()
    page.get_by_role("button", name="Sign out").click()
    page.goto("/")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


def test_a_changed_alpha_is_seen_in_force(opened: Opened, console: Console) -> None:
    console.create(alpha=0.5)
    page = with_clock(opened("/tenants/acme"))
    page.get_by_label("Alpha", exact=True).fill("0.8")
    expect(page.locator("#alpha-text")).to_contain_text("stronger by 0.3 than in force")
    save(page, "stronger for the trial")
    expect(page.get_by_role("status").filter(has_text="Policy saved")).to_be_visible()
    expect(page.locator("#facts .big")).to_have_text("0.8")
    # The page renews itself, by when the replica has told that it is in force there.
    wait_until(lambda: console.is_in_step("one"))
    renew(page)
    expect(page.locator("#facts")).to_contain_text("one in force 0.8", timeout=10_000)
    expect(page.locator("#history")).to_contain_text("stronger for the trial")
    assert console.policy().alpha == 0.8
    assert console.services.directory.policy("acme", 0.0).alpha == 0.8


def test_a_replica_that_is_behind_is_shown_until_it_is_not(
    opened: Opened, console: Console
) -> None:
    revision = console.create(alpha=0.5)
    wait_until(lambda: console.services.sync.status.revision == revision)
    console.beat("two", revision=revision - 1)
    page = with_clock(opened("/"))
    row = page.get_by_role("row").filter(has_text="acme")
    expect(row).to_contain_text(f"behind at {revision - 1}")
    console.beat("two")
    renew(page)
    expect(row).to_contain_text("0.5 on one, two", timeout=10_000)


def test_a_stale_form_shows_what_changed_and_loses_nothing(
    opened: Opened, console: Console
) -> None:
    seen = console.create(alpha=0.5)
    page = opened("/tenants/acme")
    page.get_by_label("Alpha", exact=True).fill("0.7")
    page.get_by_label("Concurrent requests").fill("12")
    now = console.set_policy(alpha=0.9, client_override="strengthen")
    save(page, "calmer, please")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("Not saved")
    expect(alert).to_contain_text(f"You saw revision {seen}, it is at {now} now")
    expect(alert).to_contain_text("bob changed the policy")
    expect(page.get_by_label("Alpha", exact=True)).to_have_value("0.7")
    expect(page.locator("#alpha-error")).to_have_text("Stored meanwhile: 0.9")
    expect(page.get_by_label("Concurrent requests")).to_have_value("12")
    expect(page.get_by_label("Clients may")).to_have_value("strengthen")
    expect(page.locator("#policy-reason")).to_have_value("calmer, please")
    assert console.policy().alpha == 0.9
    page.get_by_role("button", name=f"Save over revision {now}").click()
    expect(page.get_by_role("status").filter(has_text="Policy saved")).to_be_visible()
    policy = console.policy()
    assert (policy.alpha, policy.concurrency, policy.client_override) == (0.7, 12, "strengthen")


def test_the_kill_switch_goes_on_and_off(opened: Opened, console: Console) -> None:
    console.create(alpha=0.5)
    page = opened("/")
    for choice, state, kill in (
        ("Steer nobody.", "On: nobody is steered.", "unsteered"),
        ("Off.", "Off.", "none"),
    ):
        page.locator(".kill summary").click()
        page.get_by_role("radio", name=choice).check()
        page.locator("#kill-reason").fill("an incident")
        page.get_by_label("I want this now").check()
        page.get_by_role("button", name="Set the kill switch").click()
        expect(page.locator("#kill-state")).to_contain_text(state)
        wait_until(lambda kill=kill: console.services.directory.kill == kill)
    page.goto("/audit")
    expect(page.locator(".history")).to_contain_text("unsteered → after: none")
    assert console.policy().alpha == 0.5


def test_a_preview_shows_two_answers(opened: Opened, console: Console) -> None:
    console.create(alpha=0.5)
    console.engine.script = says("A red <b>square</b>.")
    page = opened("/tenants/acme")
    page.get_by_label("Question").fill("What is this?")
    picture = {"name": "red.png", "mimeType": "image/png", "buffer": image_bytes()}
    page.get_by_label("Picture").set_input_files(picture)
    page.get_by_label("First alpha").fill("0.25")
    page.get_by_role("button", name="Compare").click()
    answers = page.locator(".answers article")
    expect(answers).to_have_count(2)
    expect(answers.nth(0)).to_contain_text("Alpha 0.25")
    expect(answers.nth(1)).to_contain_text("Alpha 0.5")
    expect(answers.nth(1)).to_contain_text("A red <b>square</b>.")
    expect(page.get_by_label("Question")).to_have_value("What is this?")
    assert [each.plan.alpha for each in console.engine.requests] == [0.25, 0.5]
    page.get_by_label("Picture").set_input_files(picture | {"buffer": b"no picture"})
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#preview").get_by_role("alert")).to_contain_text("image")


def test_a_change_is_reverted_from_the_history(opened: Opened, console: Console) -> None:
    console.create(alpha=0.5)
    revision = console.set_policy(alpha=0.9)
    page = opened("/tenants/acme")
    entry = page.locator(f"#r{revision}")
    entry.get_by_text("Revert…").click()
    entry.get_by_label("Reason").fill("it was too much")
    entry.get_by_role("button", name=f"Revert change {revision}").click()
    expect(page.get_by_role("status").filter(has_text="Reverted")).to_be_visible()
    expect(page.locator("#facts .big")).to_have_text("0.5")
    assert console.policy().alpha == 0.5


def test_markup_in_reasons_and_names_stays_text(opened: Opened, console: Console) -> None:
    console.create(alpha=0.5)
    page = opened("/tenants/acme")
    page.get_by_label("Alpha", exact=True).fill("0.6")
    save(page, XSS)
    expect(page.locator("#history blockquote").first).to_have_text(XSS)
    page.goto("/audit")
    expect(page.locator("blockquote").first).to_have_text(XSS)
    page.goto("/new-tenant")
    page.get_by_label("Name").fill(XSS)
    page.locator("#new-reason").fill(XSS)
    page.get_by_role("button", name="Create tenant").click()
    expect(page.locator("#name-error")).to_contain_text("is not a name")
    expect(page.get_by_label("Name")).to_have_value(XSS)
    for path in ("/?q=", "/audit?tenant="):
        page.goto(path + XSS)
        expect(page.locator(".empty")).to_contain_text("<img src=x")
    assert page.locator("img").count() == 0


def test_a_policy_is_changed_by_keyboard_alone(opened: Opened, console: Console) -> None:
    console.create(alpha=0.5)
    page = opened("/")
    press = page.keyboard.press
    page.goto("/")
    press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    press("Enter")
    tab_to(page, page.get_by_role("link", name="acme"))
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    press("Enter")
    page.wait_for_url("**/tenants/acme")
    tab_to(page, page.get_by_label("Alpha", exact=True))
    press("Control+A")
    page.keyboard.type("0.75")
    tab_to(page, page.get_by_label("Clients may"))
    page.keyboard.type("str")
    tab_to(page, page.locator("#policy-reason"))
    page.keyboard.type("by keyboard")
    press("Tab")
    expect(page.get_by_role("button", name="Save policy")).to_be_focused()
    press("Enter")
    expect(page.get_by_role("status").filter(has_text="Policy saved")).to_be_visible()
    assert (console.policy().alpha, console.policy().client_override) == (0.75, "strengthen")


def tab_to(page: Page, target: Any) -> None:
    for _ in range(40):
        page.keyboard.press("Tab")
        if target.evaluate("each => each === document.activeElement"):
            return
    raise AssertionError("it cannot be reached with the tabulator key")


def test_the_console_works_without_its_script(opened: Opened, console: Console) -> None:
    console.create(alpha=0.5)
    page = opened("/tenants/acme", java_script_enabled=False)
    page.get_by_label("Alpha", exact=True).fill("0.8")
    save(page)
    expect(page.locator("#facts .big")).to_have_text("0.8")


def test_vectors_are_looked_at_and_activated(opened: Opened, console: Console) -> None:
    other = make_vectors(0.25)
    console.do(console.store.put_vectors(other.to_bytes()))
    page = opened("/vectors")
    page.get_by_role("link", name=other.id[:12]).click()
    expect(page.get_by_role("img").first).to_have_attribute(
        "aria-label",
        "Norm of the shift relative to the hidden state, 3 layers; largest 0.075 at layer 2",
    )
    page.locator("#activate-reason").fill("a better set")
    page.get_by_role("button", name=f"Activate {other.id[:12]}").click()
    expect(page.get_by_role("status").filter(has_text="Activated")).to_be_visible()
    wait_until(lambda: console.services.vectors.ids.get("default") == other.id)


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_the_screen(opened: Opened, console: Console, width: int) -> None:
    console.create(name="a" * 64, alpha=0.5)
    console.create(alpha=0.5)
    console.set_policy(alpha=0.6, by="b" * 60)
    console.beat("replica-" + "x" * 56, revision=1, problem="y" * 200, store="unreachable")
    page = opened("/", width)
    for path in PAGES:
        page.goto(path)
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(wide) == 0, path


def test_nothing_is_loaded_from_elsewhere(opened: Opened, console: Console) -> None:
    console.create(alpha=0.5)
    page = opened("/")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for path in PAGES:
        page.goto(path)
    assert {url for url in asked if not url.startswith(console.url)} == set()
    assert {url.rsplit("/", 1)[1] for url in asked if "/static/" in url} <= set(FILES)

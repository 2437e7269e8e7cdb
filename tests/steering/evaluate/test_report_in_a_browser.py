"""The report in a real Chromium: from a file, without a network, narrow and wide."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the extra `eval` is not installed")
pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
from playwright.sync_api import Browser, sync_playwright

from steering.evaluate import perplexity, report
from tests.steering.evaluate.report_runs import XSS, make_run, make_scores, make_states

CHROMIUM = Path("/usr/bin/chromium")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}"),
]


@pytest.fixture(scope="module")
def browser(written: Path) -> Iterator[Browser]:
    """After the run is judged: while it lives, this thread has a running event loop."""
    assert written.exists()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_run(tmp_path_factory.mktemp("browser") / "run")
    make_states().save(path)
    perplexity.save(path, make_scores())
    return report.write(path)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_nothing_is_complained_of(
    browser: Browser, written: Path, width: int, scheme: str
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 800},
        color_scheme=scheme,  # type: ignore[arg-type]
        java_script_enabled=True,
    )
    page = context.new_page()
    complaints, asked = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(written.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) == 0
    assert page.get_by_text(XSS).first.is_visible()
    colours = page.evaluate(
        "[...document.querySelectorAll('svg.chart text')].map(each => getComputedStyle(each).fill)"
    )
    style = "getComputedStyle(document.querySelector('%s')).color"
    ink, soft = page.evaluate(style % "body"), page.evaluate(style % ".lead")
    assert len(colours) > 50 and set(colours) == {ink, soft}  # legible in light and dark
    assert page.locator("svg.chart").first.bounding_box()["height"] > 150
    context.close()
    assert complaints == [] and asked == [written.as_uri()]


def test_it_prints_with_every_table_whole(browser: Browser, written: Path) -> None:
    page = browser.new_page()
    page.goto(written.as_uri())
    page.emulate_media(media="print")
    overflow = "getComputedStyle(document.querySelector('.wide')).overflowX"
    assert page.evaluate(overflow) == "visible"
    assert page.pdf()[:4] == b"%PDF"
    page.close()

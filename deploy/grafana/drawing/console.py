"""Screenshots of the console in a real Chromium: the fleet, a tenant and its latest changes."""

import io
import shutil
from pathlib import Path

from PIL import Image

from deploy.grafana.drawing.results import PictureError
from deploy.grafana.drawing.sheet import save_small
from deploy.grafana.drawing.site import TOGGLED, Site

_ARGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
# Of the tenant's page the height ends between two lines of its form.
_WIDTH, _HEIGHTS = 1120, {"/": 620, f"/tenants/{TOGGLED}": 590}
_HISTORY = 224  # a heading and two changes
_BETWEEN = 12


def save_console(site: Site, path: Path) -> None:
    """Raises PictureError where there is no Chromium."""
    from playwright.sync_api import FloatRect, sync_playwright

    program = shutil.which("chromium")
    if program is None:
        raise PictureError("the console's picture needs the program chromium in PATH")
    shots: list[Image.Image] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=_ARGS)
        context = browser.new_context(
            base_url=site.replicas[0].admin_url,
            viewport={"width": _WIDTH, "height": 800},
            color_scheme="dark",
        )
        page = context.new_page()
        page.goto("/sign-in")
        page.get_by_label("Operator key").fill(site.admin_key)
        page.get_by_role("button", name="Sign in").click()
        for place, height in _HEIGHTS.items():
            page.set_viewport_size({"width": _WIDTH, "height": height})
            page.goto(place)
            page.locator("h1").wait_for()
            shots.append(Image.open(io.BytesIO(page.screenshot())))
        top = page.evaluate("document.querySelector('#history').getBoundingClientRect().top")
        clip: FloatRect = {"x": 0, "y": top - 20, "width": _WIDTH, "height": _HISTORY}
        shots.append(Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip))))
        browser.close()
    save_small(_stacked(shots), path)


def _stacked(shots: list[Image.Image]) -> Image.Image:
    height = sum(shot.height for shot in shots) + _BETWEEN * (len(shots) - 1)
    sheet = Image.new("RGB", (_WIDTH, height), "#48555a")
    y = 0
    for shot in shots:
        sheet.paste(shot, (0, y))
        y += shot.height + _BETWEEN
    return sheet

"""What the tests in a real browser share."""

from pathlib import Path

import pytest
from demo_helpers import CHROMIUM

MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt install chromium, or the variable CHROMIUM"),
]


def give(page, *paths):
    page.locator("#mm-drop input[type=file]").set_input_files([str(p) for p in paths])


def answer_of(page, *paths) -> str:
    """Uploads an image and waits for its answer."""
    give(page, *paths)
    page.get_by_text(Path(paths[0]).name).first.wait_for()
    page.locator(".mm-answer").wait_for()
    return page.locator(".mm-answer").inner_text()


def to_tab(page, name):
    page.wait_for_timeout(300)
    tab = page.get_by_role("tab", name=name).first
    if tab.is_visible():
        tab.click()
    else:  # on a phone, behind the menu of those that do not fit
        page.get_by_role("button", name="More tabs").click()
        page.locator(".overflow-dropdown button", has_text=name).click()
    page.wait_for_timeout(300)


def serious(page) -> list[tuple[str, list[str]]]:
    """What axe objects to on a page as it is now."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    page.wait_for_timeout(300)  # colours that fade in
    report = axe.run(page).response
    assert len(report["passes"]) > 10, "the rules were applied"
    return [
        (violation["id"], [node["html"][:160] for node in violation["nodes"]][:4])
        for violation in report["violations"]
        if violation["impact"] in ("serious", "critical")
    ]

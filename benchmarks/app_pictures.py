"""The pictures of the web app in the documentation, taken in a real browser; used by `benchmarks/demo.py --docs`."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "demo" / "examples"
SCALE = 1.5
LIMIT = 250_000  # bytes of a picture


def take(url: str, folder: Path, chromium: str, flags: list[str]) -> dict[str, Any]:
    """Writes six pictures.

    Returns:
        The size in bytes of each, by its name, and under "train" the seconds that ten epochs on the sample set took.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)

        def page(width: int = 1280, height: int = 940, dark: bool = False) -> Any:
            scheme = "dark" if dark else "light"
            size = {"width": width, "height": height}
            found = browser.new_page(viewport=size, color_scheme=scheme, device_scale_factor=SCALE)
            found.set_default_timeout(60_000)
            found.goto(url)
            found.get_by_text("No image yet").wait_for()
            return found

        pictures = {"classify": _shot(_classify(page())), "explain": _shot(_explain(page(height=1280, dark=True)))}
        pictures["evaluate"] = _shot(_evaluate(page(height=1400)))
        pictures["segment"] = _shot(_segment(page(height=1000)))
        training, seconds = _train(page(height=1800))
        pictures["finetune"] = _shot(training)
        phones = [_shot(_unusual(page(390, 844))), _shot(_batch(page(390, 844))), _shot(_models(page(390, 844, True)))]
        pictures["phone"] = _side_by_side(phones)
        browser.close()
    folder.mkdir(parents=True, exist_ok=True)
    return {name: _save(picture, folder / f"{name}.webp") for name, picture in pictures.items()} | {"train": seconds}


def _give(page: Any, *names: str) -> None:
    page.locator("#mm-drop input[type=file]").set_input_files([str(EXAMPLES / name) for name in names])


def _classify(page: Any) -> Any:
    _give(page, "blood_neutrophil.webp")
    page.locator(".mm-answer").wait_for()
    return page


def _explain(page: Any) -> Any:
    _classify(page)
    page.get_by_role("button", name="Explain this prediction").click()
    page.get_by_text("Ready", exact=True).wait_for()
    page.get_by_label("Check the maps").check()
    page.locator("#mm-run-explain").click()
    page.locator("#mm-downloads button").first.wait_for()
    return page


def _tab(page: Any, name: str) -> None:
    """Opens a tab, which on a phone may be in the menu of those that do not fit."""
    page.wait_for_timeout(300)
    tab = page.get_by_role("tab", name=name).first
    if tab.is_visible():
        tab.click()
    else:
        page.get_by_role("button", name="More tabs").click()
        page.locator(".overflow-dropdown button", has_text=name).click()


def _evaluate(page: Any) -> Any:
    _tab(page, "Evaluate")
    page.locator("#mm-evaluate-sample").click()
    page.get_by_text("Worst mistakes").wait_for()
    page.locator("#mm-run-evaluate").wait_for()
    page.wait_for_timeout(1500)
    return page


def _segment(page: Any) -> Any:
    _tab(page, "Segment")
    page.locator("#mm-segment-examples button", has_text="nevus").click()
    page.get_by_text("Share of the image").wait_for()
    page.wait_for_timeout(1200)
    return page


def _train(page: Any) -> tuple[Any, float]:
    _tab(page, "Fine-tune")
    page.locator("#mm-sample").click()
    page.locator("#mm-set .mm-card").wait_for()
    began = time.perf_counter()
    page.locator("#mm-run-train").click()
    page.locator("#mm-try").wait_for(timeout=900_000)
    return page, round(time.perf_counter() - began, 1)


def _unusual(page: Any) -> Any:
    """What the page says of an image of another kind than the model was made for."""
    page.locator(".mm-examples ul:has(button)").last.locator("button").first.click()
    page.locator(".mm-answer").wait_for()
    page.wait_for_timeout(1200)  # it scrolls there
    return page


def _batch(page: Any) -> Any:
    _give(page, *(path.name for path in sorted(EXAMPLES.glob("blood_*.webp"))))
    page.locator(".mm-batch").wait_for()
    page.wait_for_timeout(1200)
    return page


def _models(page: Any) -> Any:
    _tab(page, "Models")
    return page


def _shot(page: Any) -> Image.Image:
    page.mouse.move(2, 2)  # nothing is pointed at
    page.evaluate("document.activeElement?.blur()")
    page.wait_for_timeout(700)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    page.close()
    return picture


def _side_by_side(pictures: list[Image.Image], gap: int = 36) -> Image.Image:
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    whole = Image.new("RGB", (width, max(p.height for p in pictures)), "white")
    x = 0
    for picture in pictures:
        whole.paste(picture, (x, 0))
        x += picture.width + gap
    return whole


def _save(picture: Image.Image, path: Path) -> int:
    """Writes a WebP, as good as fits below the limit; returns its size."""
    for quality in (88, 80, 70, 60):
        picture.save(path, quality=quality, method=6)
        if path.stat().st_size < LIMIT:
            break
    return path.stat().st_size

"""The demo's report in a real browser: on a phone and on a wide screen, light and dark."""

import pytest
from browser import FOUND, measured, pictured
from demo_reports import full, plain

from growth.demo.page import page
from growth.demo.style import DARK, LIGHT

pytestmark = pytest.mark.skipif(FOUND is None, reason="needs a browser: chromium")
PHONE, SCREEN = 390, 1280


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


def opened(html: str) -> str:
    return html.replace("<details>", "<details open>")


def test_the_page_fits_a_phone_and_a_screen_in_light_and_dark(tmp_path):
    """With everything unfolded; the last page has boxes that do not scroll, which must be seen."""
    html = opened(page(full()))
    pages = [(html, width, scheme) for width in (PHONE, SCREEN) for scheme in ("light", "dark")]
    broken = html.replace(".scroll { overflow-x: auto;", ".scroll { overflow-x: visible;")
    assert broken != html
    *told, wide = measured(
        [*pages, (opened(page(plain())), 320, "light"), (broken, PHONE, "light")], tmp_path
    )
    for one, width in zip(told, (PHONE, PHONE, SCREEN, SCREEN, 320)):
        assert one["width"] == width and one["content"] <= width, one
        assert one["wide"] == [] and one["height"] > 1500, one
        assert one["text"] >= (8.5 if width == 320 else 9), one
    for one, colours in zip(told, (LIGHT, DARK, LIGHT, DARK)):
        assert (one["paper"], one["ink"]) == (rgb(colours["paper"]), rgb(colours["ink"]))
    assert wide["content"] > PHONE


def test_a_screenshot_shows_ink_on_light_paper_and_light_on_dark(tmp_path):
    image = pytest.importorskip("PIL.Image")
    html = page(full())
    with image.open(
        pictured([(html, w, s) for w in (PHONE, SCREEN) for s in ("light", "dark")], tmp_path)
    ) as png:
        grey = png.convert("L")
    left = 0
    for width, scheme in ((PHONE, "light"), (PHONE, "dark"), (SCREEN, "light"), (SCREEN, "dark")):
        shades = grey.crop((left, 0, left + width, grey.height)).histogram()
        paper, ink = (sum(shades[200:]), sum(shades[:90]))
        paper, ink = (paper, ink) if scheme == "light" else (ink, paper)
        assert paper > 0.7 * sum(shades) and ink > 0.005 * sum(shades), (width, scheme, paper, ink)
        left += width

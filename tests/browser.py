"""Pages in a real browser, headless: what they measure, and how they look."""

import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

FOUND = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
OPTIONS = "--headless --no-sandbox --disable-gpu --disable-background-networking --hide-scrollbars".split()

# A page a frame: a window cannot be as narrow as a phone, and a frame has the colour scheme of its element.
SCRIPT = """
addEventListener('load', () => {
  const told = [...document.querySelectorAll('iframe')].map(frame => {
    const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow
    const inside = x => x.closest('.scroll, details:not([open]), svg') && !x.matches('.scroll, svg.chart')
    const box = x => x.getBoundingClientRect()
    const right = root.clientWidth + .5
    const wide = [...page.querySelectorAll('main *')].filter(x => !inside(x) && box(x).right > right)
    const text = [...page.querySelectorAll('svg text')].map(x => {
      const svg = x.closest('svg.chart')
      return parseFloat(view.getComputedStyle(x).fontSize) * box(svg).width / svg.viewBox.baseVal.width
    })
    const paper = view.getComputedStyle(page.body)
    return {width: root.clientWidth, content: root.scrollWidth, height: root.scrollHeight,
            text: Math.min(...text), wide: wide.map(x => x.tagName + '.' + x.className),
            paper: paper.backgroundColor, ink: paper.color}
  })
  document.getElementById('told').textContent = JSON.stringify(told)
})
"""


def frames(pages: list[tuple[str, int, str]], height: int) -> str:
    """A page that shows others beside each other: their HTML, width, and the scheme, light or dark."""
    size = f"height:{height}px;border:0"
    shown = "".join(
        f"<iframe style='width:{width}px;{size};color-scheme:{scheme}' srcdoc=\"{escape(html)}\"></iframe>"
        for html, width, scheme in pages
    )
    style = "body { margin: 0; display: flex; width: max-content } pre { display: none }"
    head = f"<meta charset='utf-8'><style>{style}</style><script>{SCRIPT}</script>"
    return f"<!doctype html><html><head>{head}</head><body>{shown}<pre id='told'></pre></body></html>"


def measured(pages: list[tuple[str, int, str]], folder: Path) -> list[dict]:
    """Of each page: its width, that of its content, what sticks out, a chart's smallest text in pixels."""
    dom = _run(frames(pages, 800), folder, "--dump-dom", "--window-size=1280,800").stdout
    return json.loads(re.search(r"<pre id=\"told\">(.*?)</pre>", dom, re.S)[1])


def pictured(pages: list[tuple[str, int, str]], folder: Path, height: int = 1600) -> Path:
    """The pages beside each other, as a PNG."""
    file, width = folder / "pages.png", sum(width for _, width, _ in pages)
    _run(frames(pages, height), folder, f"--screenshot={file}", f"--window-size={width},{height}")
    return file


def _run(html: str, folder: Path, *options: str) -> subprocess.CompletedProcess:
    file = folder / "frames.html"
    file.write_text(html, encoding="utf-8")
    command = [
        FOUND,
        *OPTIONS,
        f"--user-data-dir={folder / 'profile'}",
        *options,
        file.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)

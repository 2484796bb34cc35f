"""The README's picture of a report: edits twelve records of the embedded benchmark and photographs the page.

    python -m tests.support.report_picture

writes `pipeline/report/example.png`. Needs Chromium; takes a minute or two on two cores.
"""

from __future__ import annotations

import io
import tempfile
from dataclasses import replace
from pathlib import Path

from PIL import Image
from rich.console import Console

from pipeline import demo
from pipeline.driver.run import run
from tests.support.browser import chromium

FILE = Path(demo.__file__).parent / "report" / "example.png"
EDITS, WIDTH, COLOURS = 12, 1280, 128
PROBES = 4
"""Questions of the first edit that are in the picture."""


def photograph(page_file: Path, width: int = WIDTH) -> bytes:
    """A PNG of a report from its top to the first questions of its first edit."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 2400}, color_scheme="light")
        page.goto(page_file.as_uri())
        page.wait_for_function("[...document.querySelector('.edit').querySelectorAll('img')].every(i => i.complete)")
        box = page.locator(".edit").first.locator(".probes tbody tr").nth(PROBES - 1).bounding_box()
        picture = page.screenshot(clip={"x": 0, "y": 0, "width": width, "height": box["y"] + box["height"]})
    with Image.open(io.BytesIO(picture)) as image:
        buffer = io.BytesIO()
        image.convert("RGB").quantize(COLOURS).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        section = demo.records_section(out) | {"limit": EDITS}
        config = demo.arm_config(demo.ARMS[demo.ODEDIT], out, section)
        config = replace(config, tracking=replace(config.tracking, enabled=False))
        outcome = run(config, Console(stderr=True))
        FILE.write_bytes(photograph(Path(str(outcome.workspace.report))))
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

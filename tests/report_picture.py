"""
The picture of a report in the documentation, after `make demo`:

    python tests/report_picture.py runs/tiny/sweep/report.html docs/report.png
"""

import sys
import tempfile
from pathlib import Path

from browser import Browser

WIDTH = 1280


def main(report: Path, picture: Path) -> None:
    """The page from its head to its samples, in full colour."""
    with tempfile.TemporaryDirectory() as folder:
        browser = Browser(Path(folder) / "profile")
        try:
            browser.open(report.absolute(), width=WIDTH)
            browser.wait("document.documentElement.dataset.ready === ''")
            height = browser.js("Math.ceil(document.getElementById('facts').getBoundingClientRect().top)")
            browser.call(
                "Emulation.setDeviceMetricsOverride", width=WIDTH, height=height, deviceScaleFactor=1, mobile=False
            )
            browser.screenshot(picture)
        finally:
            browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""
The picture of the server's page in the documentation, after `make demo`:

    .venv/bin/dera serve --adapter runs/tiny/dpo &
    python tests/serve_picture.py http://127.0.0.1:8000 docs/serve.png
"""

import json
import sys
import tempfile
from pathlib import Path

from browser import Browser

WIDTH = 1000
VALUES = {
    "prompt": "Before sunrise, Clara the potter wanted to paint a clay jug for an old friend.",
    "max_tokens": "80",
    "temperature": "0",
}


def main(url: str, picture: Path) -> None:
    """One prompt at λ=1 and λ=0, and what the branches say of the token on which they differ most."""
    with tempfile.TemporaryDirectory() as folder:
        browser = Browser(Path(folder) / "profile")
        try:
            browser.open(url, width=WIDTH)
            browser.wait("!document.querySelector('#main').hidden")
            for name, value in VALUES.items():
                browser.js(
                    f"(() => {{ const field = document.getElementById({json.dumps(name)}); "
                    f"field.value = {json.dumps(value)}; "
                    "field.dispatchEvent(new Event('input', {bubbles: true})); })()"
                )
            browser.point("#compare", click=True)
            browser.point("#send", click=True)
            browser.wait("!running && document.querySelectorAll('.token').length")
            browser.point(".token:nth-child(4)")
            browser.wait("document.querySelector('#reading').textContent")
            height = browser.js(
                "Math.ceil(scrollY + document.querySelector('details').getBoundingClientRect().bottom) + 16"
            )
            browser.call(
                "Emulation.setDeviceMetricsOverride", width=WIDTH, height=height, deviceScaleFactor=1, mobile=False
            )
            browser.js("scrollTo(0, 0)")
            browser.screenshot(picture)
        finally:
            browser.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

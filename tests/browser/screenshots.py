"""Take the pictures of the page in docs/images: of canned states, or with a URL of a daemon that runs.

The two large ones there are live_screenshots.py's; without a URL only the one of a phone is taken.

python tests/browser/screenshots.py [http://127.0.0.1:PORT NAME]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import daemon_states  # noqa: E402
from chromium import Chromium, find_chromium  # noqa: E402
from served_page import ServedPage  # noqa: E402

IMAGES = HERE.parents[1] / "docs" / "images"
WIDE, PHONE = (1120, 1480), (360, 1480)
PICTURES = (
    ("page-at-rest", daemon_states.at_rest, WIDE, "light"),
    ("page-cold-load", daemon_states.cold_load, WIDE, "dark"),
    ("page-phone", daemon_states.cold_load, PHONE, "light"),
)


def shoot(browser: Chromium, url: str, name: str, size: tuple[int, int], scheme: str) -> None:
    """Take one picture, from the top of the page down to a height."""
    with browser.open_tab(*size, prefers_color_scheme=scheme, prefers_reduced_motion="reduce") as tab:
        tab.go(url, "document.querySelector('#tier-list .tier') !== null")
        (IMAGES / f"{name}.png").write_bytes(tab.shoot(height=size[1]))


def main(arguments: list[str]) -> None:
    program = find_chromium()
    if program is None:
        raise SystemExit("no chromium is on PATH: apt-get install chromium")
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Chromium(program, Path(folder)) as browser:
        for name, state, size, scheme in PICTURES:
            if not arguments and size == PHONE:
                with ServedPage(state()) as page:
                    shoot(browser, page.url, name, size, scheme)
            elif name in arguments[1:]:
                shoot(browser, arguments[0], name, size, scheme)


if __name__ == "__main__":
    main(sys.argv[1:])

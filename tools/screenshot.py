"""Take a picture of the page of a run after it has drawn a prompt; docs/demo.png was made by it.

python tools/screenshot.py RUN docs/demo.png --prompt seven      # needs pip install '.[demo,demo-test]' and Chromium
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from transfusion_fast.errors import InputError, optional_module


def main() -> int:
    """Take the picture that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("out", type=Path, metavar="OUT", help="PNG to write")
    parser.add_argument("--prompt", required=True, help="what to draw")
    options = parser.parse_args()
    page = [sys.executable, str(Path(__file__).parents[1] / "train" / "demo.py"), str(options.run)]
    try:
        playwright = optional_module("playwright.sync_api", "demo-test")
        chromium = shutil.which("chromium")
        if chromium is None:
            raise InputError("chromium must be on the path, got none; install Debian's package of that name")
        with subprocess.Popen(page, stdout=subprocess.PIPE, text=True) as served:
            assert served.stdout is not None
            try:
                if line := served.stdout.readline():
                    _take(playwright, chromium, line.split()[1], options)
            finally:
                served.send_signal(signal.SIGINT)
                served.communicate()  # what it still prints needs a reader
    except InputError as error:
        print(f"screenshot: {error}", file=sys.stderr)
        return 2
    return 0 if line else 1


def _take(playwright: object, chromium: str, address: str, options: argparse.Namespace) -> None:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1140, "height": 640}, device_scale_factor=1.5)
        tab.goto(address)
        tab.locator("#prompt textarea").fill(options.prompt)
        tab.locator("#prompt textarea").press("Enter")
        tab.locator("#answer", has_text="done").wait_for(timeout=300_000)
        tab.screenshot(path=options.out)
        browser.close()


if __name__ == "__main__":
    sys.exit(main())

"""The browser that the tests drive: found, or where that is possible installed. `python -m tests.browser.chromium`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

NAMED_IN = "REPE_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """Its path: what REPE_CHROMIUM names, else the first of the usual names that is there."""
    named = os.environ.get(NAMED_IN)
    candidates = (named,) if named else NAMES
    return next((path for name in candidates if (path := shutil.which(name))), None)


def main() -> None:
    if find() is None and not os.environ.get(NAMED_IN) and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for step in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", "--quiet", *step], env=quiet, check=True)
    path = find()
    if path is None:
        sys.exit(
            f"no browser: {os.environ.get(NAMED_IN) or ', '.join(NAMES)} not found. Install Chromium (on Debian, "
            f"apt-get install chromium), or name its path in {NAMED_IN}"
        )
    print(path)


if __name__ == "__main__":
    main()

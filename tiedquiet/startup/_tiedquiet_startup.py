"""Run by Python at start-up (see `tiedquiet.pth` and `tiedquiet.start`); outside the package, whose import enables it."""

import os
import sys


def start() -> None:
    """Enable tiedquiet where the environment asks for it; whatever goes wrong, the interpreter starts."""
    if os.environ.get("TIEDQUIET", "").strip().lower() in ("", "0", "off", "false", "no"):
        return
    try:
        __import__("tiedquiet")
    except Exception as error:
        print(f"tiedquiet stays off: {error}", file=sys.stderr)

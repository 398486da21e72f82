"""Run by Python at start-up, by `tiedquiet.pth` or `tiedquiet.start`.

It is installed beside the package, not in it: importing anything of the package would enable tiedquiet.
"""

import os
import sys

_started = False


def start() -> None:
    """Enable tiedquiet where the environment asks for it; whatever goes wrong, the interpreter starts."""
    global _started
    # In a virtual environment Python may read its `.pth` files twice.
    if _started or os.environ.get("TIEDQUIET", "").strip().lower() in ("", "0", "off", "false", "no"):
        return
    _started = True
    try:
        __import__("tiedquiet")
    except Exception as error:
        print(f"tiedquiet stays off: {error}", file=sys.stderr)

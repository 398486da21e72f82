"""Run by Python at start-up, by `tiedquiet.pth` or `tiedquiet.start`.

It is installed next to the package, not in it: importing anything from the package would enable tiedquiet.
"""

import os
import sys

_started = False


def start() -> None:
    """Enable tiedquiet if the environment asks for it; whatever goes wrong, the interpreter starts."""
    global _started
    # In a virtual environment Python may read its `.pth` files twice.
    if _started or _word() in ("", "0", "off", "false", "no"):
        return
    _started = True
    try:
        __import__("tiedquiet")
    except Exception:
        # Its dependencies may be in a folder that Python adds later: a virtual environment's system packages, say. And
        # an invalid mode must not stop a program that never loads a model.
        sys.meta_path.insert(0, _AtTransformers())


def _word() -> str:
    return os.environ.get("TIEDQUIET", "").strip().lower()


class _AtTransformers:
    """Finds nothing; but it is called when transformers is imported, and then imports tiedquiet first."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "transformers":
            sys.meta_path.remove(self)
            try:
                __import__("tiedquiet")
            except ValueError as error:  # the word is no mode: a guard that was asked for is not lost by a typo
                raise SystemExit(f"tiedquiet: {error}") from error
            except Exception as error:
                if _word() == "strict":
                    raise SystemExit(f"tiedquiet: no guard, although TIEDQUIET=strict asks for one: {error}") from error
                print(f"tiedquiet stays off: {error}", file=sys.stderr)

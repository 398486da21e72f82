"""On and off. All that `import tiedquiet` runs; the rest of the shim is imported along with transformers."""

import sys
from types import ModuleType

import wrapt

from tiedquiet import mode

WRAPPED = ("transformers.utils.loading_report", "transformers.modeling_utils", "transformers.trainer")

_hooked = False


def switch(new: mode.Mode, origin: str) -> None:
    """Wrap transformers' functions, now or as soon as it is imported; with `off`, put the originals back.

    Raises:
        LoadError: the new mode is `strict`, and the transformers that is imported cannot be guarded.
    """
    global _hooked
    mode.current, mode.origin = new, origin
    if new == "off":
        if "tiedquiet.patch" in sys.modules:
            from tiedquiet import patch

            patch.unwrap()
        return
    for name in WRAPPED:
        if not _hooked:
            wrapt.register_post_import_hook(_on_import, name)
        elif name in sys.modules:
            _wrap(sys.modules[name])
    _hooked = True


def _wrap(module: ModuleType) -> None:
    from tiedquiet import patch

    patch.wrap(module)


def _on_import(module: ModuleType) -> None:
    if mode.current != "off":
        try:
            _wrap(module)
        except Exception as error:  # an import of transformers must not fail for it, unless a guard was asked for
            if mode.current == "strict":
                raise SystemExit(f"tiedquiet: {error}") from error
            print(f"tiedquiet stays off: {error}", file=sys.stderr)

"""On and off. All that `import tiedquiet` runs; the rest of the shim is imported along with transformers."""

import sys
from types import ModuleType

import wrapt

from tiedquiet import mode

REPORT = "transformers.utils.loading_report"
MODELS = "transformers.modeling_utils"
TRAINER = "transformers.trainer"

_hooked = False


def switch(new: mode.Mode) -> None:
    """Wrap transformers' seams, now or as soon as it is imported; with `off`, put the originals back."""
    global _hooked
    mode.current = new
    if new == "off":
        if "tiedquiet.patch" in sys.modules:
            from tiedquiet import patch

            patch.unwrap()
        return
    for name in (REPORT, MODELS, TRAINER):
        if not _hooked:
            wrapt.register_post_import_hook(_on_import, name)
        elif name in sys.modules:
            _on_import(sys.modules[name])
    _hooked = True


def _on_import(module: ModuleType) -> None:
    if mode.current == "off":
        return
    try:
        from tiedquiet import patch

        patch.wrap(module)
    except Exception as error:  # an import of transformers must not fail for it
        print(f"tiedquiet stays off: {error}", file=sys.stderr)

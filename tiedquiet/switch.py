"""On and off. Everything that `import tiedquiet` runs; the rest of the shim is imported along with what it wraps."""

import sys
from threading import RLock
from types import ModuleType, TracebackType

import wrapt

from tiedquiet import mode as modes

# Each module with functions that are wrapped, and the door that wraps them.
DOORS = {
    "transformers.utils.loading_report": "tiedquiet.doors.from_pretrained",
    "transformers.modeling_utils": "tiedquiet.doors.from_pretrained",
    "transformers.quantizers.base": "tiedquiet.doors.from_pretrained",
    "transformers.trainer": "tiedquiet.doors.trainer",
    "transformers.integrations.deepspeed": "tiedquiet.doors.trainer",
    "transformers.models.wav2vec2.modeling_wav2vec2": "tiedquiet.doors.languages",
    "peft.peft_model": "tiedquiet.doors.adapters",
}

_hooked = False
# What one thread finds not wrapped, no other wraps meanwhile, or takes off. Nothing is imported under it: a thread that
# is importing one of these modules may be waiting for it.
_lock = RLock()


class _Restore:
    """Undoes a mode when left as a context manager; inside, the mode applies to this context alone."""

    def __init__(self, setting: modes.Setting) -> None:
        self._setting, self._before = setting, modes.put(setting)

    def __enter__(self) -> None:
        modes.enter(self._setting)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        modes.leave(self._setting, self._before)
        wrap()  # inside, all may have been switched off
        unwrap()


def enable(mode: str | None = None) -> _Restore:
    """Switch tiedquiet on for every load from here on.

    Args:
        mode: `on`, `repair`, `strict` or `off` (or a synonym that `TIEDQUIET` takes); None reads `TIEDQUIET`.
            With `off` the functions stay wrapped, but do nothing; `disable` puts the originals back.

    Returns:
        A context manager. In a `with`, the mode applies to this context (thread, task) and to the threads started in
        it, and leaving restores the previous mode; without, it applies to the process from here on.

    Raises:
        ValueError: not a mode; the message lists the modes.
        LoadError: the mode is `strict`, and the imported transformers cannot be guarded.
    """
    setting = modes.from_environment() if mode is None else modes.Setting(modes.parse(mode, "mode"), "tiedquiet.enable")
    restore = _Restore(setting)
    wrap()
    return restore


def disable() -> None:
    """Put the libraries' own functions back. Harmless when there is nothing to put back."""
    modes.put(modes.Setting("off", "tiedquiet.disable"))
    unwrap()


def wrap() -> None:
    """Wrap the libraries' functions, now or when they are imported, if any mode in force asks for it.

    Raises:
        LoadError: the mode in force is `strict`, and what is imported cannot be guarded.
    """
    global _hooked
    if not modes.is_on_somewhere():
        return
    for name in DOORS:
        if not _hooked:
            wrapt.register_post_import_hook(_on_import, name)
        elif name in sys.modules:
            _wrap(sys.modules[name])
    _hooked = True


def unwrap() -> None:
    """Put the originals back, unless another thread has a mode in force: it may be in the middle of a load."""
    if "tiedquiet.doors.wrapping" in sys.modules:
        from tiedquiet.doors import wrapping

        with _lock:
            if not modes.is_on_somewhere():
                wrapping.unwrap()


def _wrap(module: ModuleType) -> None:
    __import__(DOORS[module.__name__])
    from tiedquiet.doors import wrapping

    with _lock:
        wrapping.wrap(module)


def _on_import(module: ModuleType) -> None:
    if modes.is_on_somewhere():
        try:
            _wrap(module)
        except Exception as error:  # an import must not fail for it, unless a guard was asked for
            if modes.current() == "strict":
                raise SystemExit(f"tiedquiet: {error}") from error
            print(f"tiedquiet stays off: {error}", file=sys.stderr)

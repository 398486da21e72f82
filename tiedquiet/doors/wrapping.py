"""One way of wrapping for all doors: on and off, what is wrapped and by whom, and what happens if our code fails."""

import copy
import inspect
import logging
import operator
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar
from weakref import WeakSet

import wrapt

from tiedquiet import mode, words
from tiedquiet.verdict import LoadError

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Seam:
    """A function of a library that is wrapped.

    Attributes:
        module: where it lives.
        owner: a class of that module, or empty for the module itself.
        names: its name, in one release or another.
        forms: sets of parameters; a function that has all of one set is understood.
        hook: what is called in its place.
        has_overrides: whether the overrides of subclasses are wrapped as well.
    """

    module: str
    owner: str
    names: tuple[str, ...]
    forms: tuple[frozenset[str], ...]
    hook: Callable[..., Any]
    has_overrides: bool = False

    def __str__(self) -> str:
        return ".".join(filter(None, (self.module, self.owner, self.names[0])))

    def find(self) -> tuple[Any, str] | None:
        """The object that has the function, and its name there; None if its signature is not understood."""
        owner = self.holder()
        for name in self.names:
            if name in getattr(owner, "__dict__", ()):
                parameters = set(inspect.signature(getattr(owner, name)).parameters)
                return (owner, name) if any(form <= parameters for form in self.forms) else None
        return None

    def holder(self) -> Any:
        """The class or the module that has it now, which may have been imported anew."""
        module = sys.modules.get(self.module)
        return getattr(module, self.owner, None) if self.owner else module


# A program may copy a function, or hand it to another process: what stands in its place goes the same way.
class _Bound(wrapt.BoundFunctionWrapper):  # type: ignore[type-arg]
    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner = getattr(self, "__self__", None)
        return self if owner is None else getattr(copy.deepcopy(owner, memo), self.__name__)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        owner = getattr(self, "__self__", None)
        if owner is None:
            return pkgutil.resolve_name, (f"{self.__module__}:{self.__qualname__}",)
        return getattr, (owner, self.__name__)


class _Wrapper(wrapt.FunctionWrapper):  # type: ignore[type-arg]
    __bound_function_wrapper__ = _Bound

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: object) -> Any:
        return self

    def __reduce_ex__(self, protocol: object) -> Any:
        if "." not in self.__qualname__:
            return self.__qualname__
        return operator.getitem, ((self.__wrapped__,), 0)  # of a class that is pickled piece by piece


@dataclass
class _Wrapping:
    owner: Any
    name: str
    original: Any
    wrapper: Any


_seams: list[Seam] = []
# The classes that override what is wrapped. No function is kept of theirs: one that calls `super()` keeps its class.
_overriding: WeakSet[type] = WeakSet()
_wrappings: dict[Seam, _Wrapping] = {}
_parameters: dict[str, list[str]] = {}  # of each wrapped function, asked once: a signature costs more than a verdict
_said: set[str] = set()


def add(*seams: Seam) -> None:
    """Take in what a door wraps."""
    _seams.extend(seams)


def is_wrapped(seam: Seam) -> bool:
    """Whether a seam is wrapped."""
    return seam in _wrappings


def wrap(module: ModuleType) -> None:
    """Wrap the seams of a module that are not wrapped yet.

    Raises:
        LoadError: in `strict`, if a seam cannot be wrapped.
    """
    for seam in [seam for seam in _wrappings if seam.module == module.__name__]:
        if _is_taken_off(seam):
            del _wrappings[seam]
        elif seam.has_overrides:
            _wrap_overrides(seam)
    if not (left := [seam for seam in _seams if seam.module == module.__name__ and seam not in _wrappings]):
        return
    problem = inert_because()
    for seam in left:
        if not problem:
            try:
                if not _wrap(seam):
                    problem = f"{seam} has a signature that this release of tiedquiet does not know; left alone"
            except Exception as error:
                problem = f"{seam} cannot be wrapped: {error}"
            if problem and mode.current() != "strict":
                _say_once(logging.WARNING, problem)
                problem = ""
    if problem and mode.current() == "strict":
        raise LoadError(f"not guarded, although the mode is strict: {problem}")


def wrap_overrides(kind: type, owner: type, name: str, hook: Callable[..., Any]) -> bool:
    """Wrap what a subclass calls before its base's function, which is wrapped: its own override, and a mixin's.

    Args:
        kind: the subclass.
        owner: the base.
        name: the function.
        hook: what is called in its place.

    Returns:
        Whether there was one that was not wrapped.
    """
    found = False
    for own in kind.__mro__[: kind.__mro__.index(owner)]:
        original = vars(own).get(name)
        if original is not None and not _is_ours(_innermost(original)):
            _overriding.add(own)
            setattr(own, name, _Wrapper(original, hook))
            found = True
    return found


def _wrap_overrides(seam: Seam) -> None:
    wrapping = _wrappings[seam]
    for kind in _subclasses(wrapping.owner):
        wrap_overrides(kind, wrapping.owner, wrapping.name, seam.hook)


def _is_ours(function: object) -> bool:
    return type(function) in (_Wrapper, _Bound)


def _innermost(function: Any) -> Any:
    """What is inside other packages' wrappers: ours, or else the function itself."""
    return inspect.unwrap(function, stop=_is_ours)


def _is_taken_off(seam: Seam) -> bool:
    """Whether what was wrapped is back: who had kept it has put it there, or its module was loaded anew."""
    wrapping = _wrappings[seam]
    now = getattr(seam.holder(), "__dict__", {}).get(wrapping.name)
    innermost = _innermost(now)
    is_the_library_s = not _is_ours(innermost) and getattr(innermost, "__module__", None) == seam.module
    return now is wrapping.original or is_the_library_s


def _subclasses(owner: type) -> set[type]:
    found: set[type] = set(owner.__subclasses__())
    return found.union(*map(_subclasses, found))


def unwrap() -> None:
    """Put back every original that nobody else has wrapped since."""
    for owner in list(_overriding):
        for name, wrapper in list(vars(owner).items()):
            if type(wrapper) is _Wrapper:
                setattr(owner, name, wrapper.__wrapped__)
    _overriding.clear()
    for seam, wrapping in list(_wrappings.items()):
        if not seam.owner:
            _swap_copies(wrapping.name, wrapping.wrapper, wrapping.original)
        if vars(wrapping.owner).get(wrapping.name) is wrapping.wrapper:
            setattr(wrapping.owner, wrapping.name, wrapping.original)
        if _is_taken_off(seam):
            del _wrappings[seam]
        else:
            _say_once(
                logging.INFO,
                f"{seam} was wrapped again by another package; tiedquiet's wrapper stays in place and does nothing",
            )


def inert_because() -> str:
    """Why tiedquiet can do nothing with the imported transformers; empty if it can."""
    version = str(getattr(sys.modules.get("transformers"), "__version__", "5"))
    if version.split(".")[0].isdecimal() and int(version.split(".")[0]) < 5:
        return f"transformers {version} has no loading report; tiedquiet needs 5.0.0 or newer and does nothing"
    return ""


def states() -> list[tuple[str, str, bool]]:
    """For each seam: its name, its state, and whether that is as expected."""
    found = []
    for seam in _seams:
        wrapping = _wrappings.get(seam)
        if seam.module not in sys.modules:
            found.append((str(seam), "not imported", True))
        elif wrapping is None:
            found.append((str(seam), "not wrapped: " + ("present" if seam.find() else "not understood"), False))
        elif (now := vars(wrapping.owner).get(wrapping.name)) is wrapping.wrapper:
            found.append((str(seam), "wrapped", True))
        elif _is_taken_off(seam):
            found.append((str(seam), "not wrapped: taken off since", False))
        else:
            found.append((str(seam), f"wrapped, and again by {_maker(now)}", True))
    return found


def _wrap(seam: Seam) -> bool:
    found = seam.find()
    if found is None:
        return False
    owner, name = found
    original = vars(owner)[name]
    wrapper = _Wrapper(original, seam.hook)
    setattr(owner, name, wrapper)
    _wrappings[seam] = _Wrapping(owner, name, original, wrapper)
    if seam.has_overrides:
        _wrap_overrides(seam)
    function = getattr(owner, name)
    parameters = [p for p in inspect.signature(function).parameters if p != "self"]
    _parameters[name] = _parameters[getattr(function, "__qualname__", name)] = parameters
    if not seam.owner:
        _swap_copies(name, original, wrapper)
    return True


def _swap_copies(name: str, old: object, new: object) -> None:
    """Replace the copies that other modules of the library took with `from ... import`."""
    library = f"{old.__module__.partition('.')[0]}."
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(library) and getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


def _maker(function: object) -> str:
    wrapper = getattr(function, "_self_wrapper", function)
    return str(getattr(wrapper, "__module__", None) or type(wrapper).__module__)


# For the hooks


def bind(wrapped: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    # Two doors may have a function of one name; an override of either goes by that.
    parameters = _parameters.get(getattr(wrapped, "__qualname__", "")) or _parameters[wrapped.__name__]
    return {**dict(zip(parameters, args, strict=False)), **kwargs}


def guarded(ours: Callable[[], _T]) -> tuple[_T | None, LoadError | None]:
    """What a function of ours returns; if it fails, None, and what is to be raised once the original has run."""
    try:
        return ours(), None
    except Exception as error:
        return None, stand_aside(error)


def stand_aside(error: Exception, more: str = "") -> LoadError | None:
    """Report that tiedquiet failed; the load goes on as if it were not there.

    Args:
        error: what went wrong.
        more: what else to say about it.

    Returns:
        In `strict`, what is to be raised once the original has run: a failed guard lets nothing pass.
    """
    what = f"{type(error).__name__}: {error}{more}"
    if mode.current() == "strict":
        failure = LoadError(f"tiedquiet failed, and the mode is strict, so what was loaded is not proven: {what}")
        failure.__cause__ = error
        return failure
    try:
        words.say(logging.WARNING, f"tiedquiet failed and this load goes on without it: {what}")
    except Exception:
        return None
    return None


def _say_once(level: int, message: str) -> None:
    if message not in _said:
        _said.add(message)
        words.say(level, message)

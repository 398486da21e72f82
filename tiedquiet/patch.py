"""The wrapped functions of transformers. The only file that knows wrapt and transformers; every hook fails safe."""

import copy
import inspect
import logging
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import wrapt

from tiedquiet import mode, report
from tiedquiet.checkpoint import Checkpoint
from tiedquiet.load import Load
from tiedquiet.repair import repair
from tiedquiet.verdict import WELL, Finding, LoadError, Verdict


@dataclass(frozen=True)
class Seam:
    """A function of transformers that is wrapped.

    Attributes:
        module: where it lives.
        owner: a class of that module, or empty for the module itself.
        names: what it is called, in one release or another.
        forms: sets of parameters; a function that has all of one set is understood.
        hook: what is called in its place.
    """

    module: str
    owner: str
    names: tuple[str, ...]
    forms: tuple[frozenset[str], ...]
    hook: Callable[..., Any]

    def __str__(self) -> str:
        return ".".join(filter(None, (self.module, self.owner, self.names[0])))

    def find(self) -> tuple[Any, str] | None:
        """The object that has the function, and its name there; None where it is not in a form that is understood."""
        owner = sys.modules.get(self.module)
        owner = getattr(owner, self.owner, None) if self.owner else owner
        for name in self.names:
            if name in getattr(owner, "__dict__", ()):
                parameters = set(inspect.signature(getattr(owner, name)).parameters)
                return (owner, name) if any(form <= parameters for form in self.forms) else None
        return None


@dataclass
class _Wrapping:
    owner: Any
    name: str
    original: Any
    wrapper: Any


_wrappings: dict[Seam, _Wrapping] = {}
_parameters: dict[str, list[str]] = {}  # of each wrapped function, asked once: a signature costs more than a verdict
_said: set[str] = set()


def wrap(module: ModuleType) -> None:
    """Wrap the seams of a module of transformers that are not wrapped yet.

    Raises:
        LoadError: in `strict`, where a seam cannot be wrapped.
    """
    problem = inert_because()
    for seam in SEAMS:
        if not problem and seam.module == module.__name__ and seam not in _wrappings:
            try:
                if not _wrap(seam):
                    problem = f"{seam} is not in a form that this release of tiedquiet knows; left untouched"
            except Exception as error:
                problem = f"{seam} cannot be wrapped: {error}"
            if problem and mode.current != "strict":
                _say_once(logging.WARNING, problem)
                problem = ""
    if problem and mode.current == "strict":
        raise LoadError(f"no guard, although the mode is strict: {problem}")


def unwrap() -> None:
    """Put every original back that nobody else has wrapped since."""
    for seam, wrapping in list(_wrappings.items()):
        if not seam.owner:
            _swap_copies(wrapping.name, wrapping.wrapper, wrapping.original)
        if vars(wrapping.owner).get(wrapping.name) is wrapping.wrapper:
            setattr(wrapping.owner, wrapping.name, wrapping.original)
        if vars(wrapping.owner).get(wrapping.name) is wrapping.original:
            del _wrappings[seam]
        else:
            _say_once(logging.INFO, f"{seam} was wrapped again by somebody else; tiedquiet's wrapper stays, inert")


def inert_because() -> str:
    """Why tiedquiet can do nothing with the transformers that is imported; empty where it can."""
    version = str(getattr(sys.modules.get("transformers"), "__version__", "5"))
    if version.split(".")[0].isdecimal() and int(version.split(".")[0]) < 5:
        return f"transformers {version} has no loading report; tiedquiet needs 5.0.0 or newer and is inert"
    return ""


def states() -> list[tuple[str, str, bool]]:
    """For each seam: its name, what became of it, and whether all is well with it."""
    found = []
    for seam in SEAMS:
        wrapping = _wrappings.get(seam)
        if seam.module not in sys.modules:
            found.append((str(seam), "not imported", True))
        elif wrapping is None:
            found.append((str(seam), "not wrapped: " + ("it is there" if seam.find() else "not understood"), False))
        elif (now := vars(wrapping.owner).get(wrapping.name)) is wrapping.wrapper:
            found.append((str(seam), "wrapped", True))
        else:
            found.append((str(seam), f"wrapped, and again by {_maker(now)}", True))
    return found


def _wrap(seam: Seam) -> bool:
    found = seam.find()
    if found is None:
        return False
    owner, name = found
    original = vars(owner)[name]
    wrapper = wrapt.FunctionWrapper(original, seam.hook)
    setattr(owner, name, wrapper)
    _wrappings[seam] = _Wrapping(owner, name, original, wrapper)
    _parameters[name] = [p for p in inspect.signature(getattr(owner, name)).parameters if p != "self"]
    if not seam.owner:
        _swap_copies(name, original, wrapper)
    return True


def _swap_copies(name: str, old: object, new: object) -> None:
    """Replace the copies that other modules of transformers took with `from ... import`."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("transformers.") and getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


def _maker(function: object) -> str:
    wrapper = getattr(function, "_self_wrapper", function)
    return str(getattr(wrapper, "__module__", None) or type(wrapper).__module__)


# The hooks


def _on_read(wrapped: Callable[..., Any], _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `_load_pretrained_model`: note what was stored, and where it lies, before anything is initialised."""
    result = wrapped(*args, **kwargs)
    # What cannot be watched afterwards is not judged.
    if mode.current != "off" and _FINALIZE in _wrappings:
        try:
            if not _left_empty():
                bound = _bind(wrapped, args, kwargs)
                model = bound["model"]
                info, offloaded = (
                    result if isinstance(result, tuple) else (result, getattr(result, "disk_offload_index", None))
                )
                missing = {*info.missing_keys, *(entry[0] for entry in info.mismatched_keys)}
                base = getattr(model, "base_model_prefix", "")
                checkpoint = Checkpoint(bound.get("state_dict"), bound.get("checkpoint_files"), base)
                protect = mode.current == "repair"
                Load(model, missing, checkpoint.read, checkpoint.files, offloaded, protect)
        except Exception as error:
            _stand_aside(error)
    return result


def _on_finalize(wrapped: Callable[..., Any], _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `_finalize_model_loading`: watch what is done to the model between reading and the report."""
    load = None
    with ExitStack() as entered:
        try:
            load = Load.unsettled(_bind(wrapped, args, kwargs)["model"])
            if load is not None:
                entered.callback(load.close)
                entered.enter_context(load.watch)
        except Exception as error:
            if load is None:
                _stand_aside(error)
            else:
                load.watch.give_up(error)  # reported when the load is judged
        return wrapped(*args, **kwargs)


def _on_move(wrapped: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `_move_missing_keys_from_meta_to_device`: it makes placeholders, perhaps a million of them."""
    load = Load.unsettled(model)
    if load is None:
        return wrapped(*args, **kwargs)
    with load.watch.aside():
        result = wrapped(*args, **kwargs)
    try:
        load.note_placeholders(model)
    except Exception as error:
        load.watch.give_up(error)
    return result


def _on_report(wrapped: Callable[..., Any], _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `log_state_dict_report`: the same report without the rows that are proven false."""
    plan = None
    try:
        bound = _bind(wrapped, args, kwargs)
        load = Load.unsettled(bound["model"]) if mode.current != "off" else None
        # transformers reports on a load that fails as well. An exception that the program was already handling when
        # it began to load is no such failure.
        if load is not None and sys.exc_info()[1] is load.in_flight:
            plan = _plan_report(load, bound)
    except Exception as error:
        _stand_aside(error)
    return _carry_out(plan, wrapped, args, kwargs)


def _on_resume(wrapped: Callable[..., Any], trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `Trainer._issue_warnings_after_load`: the same for a state dict that was copied into the model."""
    plan = None
    try:
        if mode.current != "off":
            plan = _plan_resume(trainer, _bind(wrapped, args, kwargs)["load_result"])
    except Exception as error:
        _stand_aside(error)
    return _carry_out(plan, wrapped, args, kwargs)


@dataclass
class _Plan:
    """What to call the wrapped function with, what to say afterwards, and what to raise after that."""

    keys: set[str]  # missing, and not proven to be in the model after all
    lines: list[tuple[int, str]]
    failure: LoadError | None
    arguments: dict[str, Any]


def _plan_report(load: Load, bound: dict[str, Any]) -> _Plan:
    info = bound.get("loading_info")
    missing = (info.missing_keys if info is not None else bound["missing_keys"]) or ()
    named = bound if info is not None else vars(bound["load_config"])
    plan = _conclude(load, bound["model"], named.get("pretrained_model_name_or_path"), set(missing))
    if info is not None:
        # The caller gets this very object back through `output_loading_info`.
        info = copy.copy(info)
        info.missing_keys = plan.keys
        plan.arguments = {**bound, "loading_info": info}
    else:
        plan.arguments = {**bound, "missing_keys": plan.keys}
    load.close()
    return plan


def _plan_resume(trainer: Any, loaded: Any) -> _Plan | None:
    missing = set(loaded.missing_keys)
    ignored = set(getattr(trainer.model, "_keys_to_ignore_on_save", None) or ())
    if not missing or missing == ignored:
        return None  # for exactly that set the Trainer ties again and prints nothing
    load = Load(trainer.model, missing, resumed=True)
    plan = _conclude(load, trainer.model, "the Trainer's checkpoint", missing)
    load.close()
    left = [key for key in loaded.missing_keys if key in plan.keys]
    if left and plan.keys == ignored:
        # The Trainer would take what is left for that set, and print nothing.
        what = "not in the checkpoint, since the model's _keys_to_ignore_on_save keeps them out of it"
        plan.lines.append((logging.WARNING, f"{report.name_of(trainer.model, '')}: {what}: {left}"))
    plan.arguments = {"load_result": loaded._replace(missing_keys=left)}
    return plan


def _conclude(load: Load, model: Any, where: object, missing: set[str]) -> _Plan:
    findings = load.settle(model, missing)
    repaired: list[Finding] = []
    if mode.current == "repair":
        findings, repaired = repair(load, model, findings)
    mended = {finding.key for finding in repaired}
    proven = [f for f in findings if f.verdict in WELL and f.key in missing]
    broken = [f for f in findings if f.broken] if mode.current == "strict" else []
    name = report.name_of(model, where)
    lines = [(logging.DEBUG, line) for line in report.unproven(findings)]
    if confirmed := report.confirmation([f for f in proven if f.key not in mended], repaired, _fold):
        lines.append((logging.INFO, confirmed))
    lines += [(logging.WARNING, line) for line in report.explanations([f for f in findings if f not in broken], _fold)]
    failure = LoadError(f"{name}: {'; '.join(report.explanations(broken, _fold))}", tuple(broken)) if broken else None
    filled = {f.key for f in repaired if f.verdict is Verdict.UNWRITTEN}
    return _Plan(
        missing - filled - {f.key for f in proven}, [(level, f"{name}: {line}") for level, line in lines], failure, {}
    )


def _carry_out(plan: _Plan | None, wrapped: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if plan is None:
        return wrapped(*args, **kwargs)
    try:
        result = wrapped(**plan.arguments)
    finally:
        for level, line in plan.lines:
            try:
                report.say(level, line)
            except Exception as error:
                _stand_aside(error)
    if plan.failure is not None:
        raise plan.failure
    return result


def _left_empty() -> bool:
    """Whether this process has no weights yet: FSDP's RAM-efficient loading sends it those of the first one later."""
    names = vars(sys.modules["transformers.modeling_utils"])
    return bool(names.get("is_fsdp_enabled", bool)()) and not names.get("is_local_dist_rank_0", bool)()


def _bind(wrapped: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_parameters[wrapped.__name__], args, strict=False)), **kwargs}


def _fold(names: list[str]) -> Iterable[str]:
    """Fold numbered keys as the report itself does: `layers.{0, 1}...`."""
    try:
        return list(sys.modules[_REPORT.module].update_key_name(names))
    except Exception:
        return names  # a private function of transformers: names that it cannot fold are given in full


def _stand_aside(error: Exception) -> None:
    """Tell that tiedquiet failed; the load goes on as if it were not there."""
    try:
        report.say(
            logging.WARNING, f"tiedquiet failed and this load goes on without it: {type(error).__name__}: {error}"
        )
    except Exception:
        return


def _say_once(level: int, message: str) -> None:
    if message not in _said:
        _said.add(message)
        report.say(level, message)


_REPORT = Seam(
    "transformers.utils.loading_report",
    "",
    ("log_state_dict_report",),
    (frozenset({"model", "loading_info"}), frozenset({"model", "load_config", "missing_keys"})),
    _on_report,
)
_FINALIZE = Seam(
    "transformers.modeling_utils",
    "PreTrainedModel",
    ("_finalize_model_loading", "_finalize_load_state_dict"),
    (frozenset({"model", "load_config"}),),
    _on_finalize,
)
_MOVE = Seam(
    "transformers.modeling_utils",
    "PreTrainedModel",
    ("_move_missing_keys_from_meta_to_device",),
    (frozenset({"self"}),),
    _on_move,
)
SEAMS = (
    _REPORT,
    Seam(
        "transformers.modeling_utils", "PreTrainedModel", ("_load_pretrained_model",), (frozenset({"model"}),), _on_read
    ),
    _FINALIZE,
    _MOVE,
    Seam("transformers.trainer", "Trainer", ("_issue_warnings_after_load",), (frozenset({"load_result"}),), _on_resume),
)

"""Wrapping transformers' three seams. The only file that knows wrapt and transformers; every hook fails safe."""

import copy
import inspect
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import wrapt

from tiedquiet import mode, proof, report
from tiedquiet.proof import Finding, Verdict
from tiedquiet.switch import REPORT


@dataclass(frozen=True)
class _Seam:
    module: str
    owner: str  # a class of that module, or empty for the module itself
    name: str
    needs: tuple[frozenset[str], ...]  # parameters of the forms that are understood
    hook: Callable[..., Any]

    def __str__(self) -> str:
        return ".".join(filter(None, (self.module, self.owner, self.name)))


_wrapped: dict[_Seam, tuple[object, object, object]] = {}  # seam: (owner, original, wrapper)
_parameters: dict[str, list[str]] = {}  # of each wrapped function, asked once: a signature costs more than a verdict
_said: set[str] = set()


def wrap(module: ModuleType) -> None:
    """Wrap the seams of a module of transformers that are not wrapped yet."""
    if inert_because():
        return
    for seam in _SEAMS:
        if seam.module == module.__name__ and seam not in _wrapped:
            try:
                _wrap(seam, module)
            except Exception as error:
                _aside(error)


def unwrap() -> None:
    """Put every original back that nobody else has wrapped since."""
    for seam in list(_wrapped):
        _unwrap(seam)


def inert_because() -> str:
    """Why tiedquiet can do nothing with the transformers that is imported; empty where it can."""
    version = str(getattr(sys.modules.get("transformers"), "__version__", "5"))
    if version.split(".")[0].isdecimal() and int(version.split(".")[0]) < 5:
        return f"transformers {version} has no loading report; tiedquiet needs 5.0.0 or newer and is inert"
    return ""


def warn_if_inert() -> None:
    """Say once why a check can find nothing, where that is so."""
    if reason := inert_because():
        _once(logging.WARNING, reason)


def _wrap(seam: _Seam, module: ModuleType) -> None:
    owner: Any = getattr(module, seam.owner) if seam.owner else module
    original = vars(owner).get(seam.name)
    parameters = list(inspect.signature(getattr(owner, seam.name)).parameters) if original is not None else []
    if not any(needed <= set(parameters) for needed in seam.needs):
        _once(logging.WARNING, f"{seam} is not in a form that this release of tiedquiet knows; left untouched")
        return
    wrapper = wrapt.FunctionWrapper(original, seam.hook)
    setattr(owner, seam.name, wrapper)
    _wrapped[seam] = owner, original, wrapper
    _parameters[seam.name] = [name for name in parameters if name != "self"]
    if not seam.owner:
        _swap_copies(seam.name, original, wrapper)


def _unwrap(seam: _Seam) -> None:
    owner, original, wrapper = _wrapped[seam]
    if not seam.owner:
        _swap_copies(seam.name, wrapper, original)
    if vars(owner).get(seam.name) is wrapper:
        setattr(owner, seam.name, original)
    if vars(owner).get(seam.name) is original:
        del _wrapped[seam]
    else:
        _once(logging.INFO, f"{seam} was wrapped again by somebody else; tiedquiet's wrapper stays below it, inert")


def _swap_copies(name: str, old: object, new: object) -> None:
    """Replace the copies that other modules of transformers took with `from ... import`."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("transformers.") and getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


def _on_load(wrapped: Callable[..., Any], _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `PreTrainedModel._load_pretrained_model`: record what was stored before anything is tied."""
    result = wrapped(*args, **kwargs)
    if mode.current != "off":
        try:
            if _left_empty():
                return result
            info = result[0] if isinstance(result, tuple) else result
            mismatched = (entry[0] for entry in info.mismatched_keys)
            proof.begin(_bind(wrapped, args, kwargs)["model"], {*info.missing_keys, *mismatched})
        except Exception as error:
            _aside(error)
    return result


def _left_empty() -> bool:
    """Whether this process has no weights yet: FSDP's RAM-efficient loading sends it those of the first one later."""
    names = vars(sys.modules["transformers.modeling_utils"])
    return bool(names.get("is_fsdp_enabled", bool)()) and not names.get("is_local_dist_rank_0", bool)()


def _on_report(wrapped: Callable[..., Any], _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `log_state_dict_report`: the same report without the rows that are proven false."""
    return (
        wrapped(*args, **kwargs)
        if mode.current == "off" or _is_failing()
        else _judged(_plan_report, wrapped, args, kwargs)
    )


def _on_resume(wrapped: Callable[..., Any], trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `Trainer._issue_warnings_after_load`: the same for a state dict that was copied into the model."""
    return wrapped(*args, **kwargs) if mode.current == "off" else _judged(_plan_resume, wrapped, args, kwargs)


@dataclass
class _Plan:
    """What to call the wrapped function with, what to say afterwards, and what to raise after that."""

    arguments: dict[str, Any]
    lines: list[str] = field(default_factory=list)
    failure: report.TieError | None = None


def _judged(
    plan: Callable[[Any, dict[str, Any]], _Plan | None],
    wrapped: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    planned = None
    try:
        planned = plan(getattr(wrapped, "__self__", None), _bind(wrapped, args, kwargs))
    except Exception as error:
        _aside(error)
    if planned is None:
        return wrapped(*args, **kwargs)
    try:
        result = wrapped(**planned.arguments)
    finally:
        try:
            for line in planned.lines:
                report.say(logging.WARNING, line)
        except Exception as error:
            _aside(error)
    if planned.failure is not None:
        raise planned.failure
    return result


def _plan_report(_: object, bound: dict[str, Any]) -> _Plan | None:
    info = bound.get("loading_info")
    missing = (info.missing_keys if info is not None else bound["missing_keys"]) or set()
    named = bound if info is not None else vars(bound["load_config"])
    verdicts = proof.settle(bound["model"], repairing=mode.current == "repair")
    if verdicts is None:
        return None
    kept, plan = _conclude(bound["model"], named.get("pretrained_model_name_or_path"), missing, verdicts)
    if info is not None:
        # The caller gets this very object back through `output_loading_info`.
        info = copy.copy(info)
        info.missing_keys = kept
        plan.arguments = {**bound, "loading_info": info}
    else:
        plan.arguments = {**bound, "missing_keys": kept}
    return plan


def _plan_resume(trainer: Any, bound: dict[str, Any]) -> _Plan | None:
    loaded = bound["load_result"]
    missing = set(loaded.missing_keys)
    ignored = set(getattr(trainer.model, "_keys_to_ignore_on_save", None) or ())
    if not missing or missing == ignored:
        return None  # at that very set the Trainer ties again and prints nothing
    proof.begin(trainer.model, missing)
    verdicts = proof.settle(trainer.model, repairing=mode.current == "repair") or ([], [])
    kept, plan = _conclude(trainer.model, "the Trainer's checkpoint", missing, verdicts)
    if kept and kept == ignored:
        kept = missing  # the remaining, true keys would be taken for that set, and hidden
    plan.arguments = {"load_result": loaded._replace(missing_keys=[k for k in loaded.missing_keys if k in kept])}
    return plan


def _conclude(
    model: object, where: object, missing: set[str], verdicts: tuple[list[Finding], list[Finding]]
) -> tuple[set[str], _Plan]:
    """Confirm what is proven; return the missing keys that stay, and what is loud about them."""
    findings, repaired = verdicts
    shown = {f.tie.key for f in repaired} | set(missing)
    proven = [f for f in findings if f.tie.verdict is Verdict.TIED and f.tie.key in shown]
    if proven:
        report.say(logging.INFO, report.confirmation(model, where, proven, repaired, _fold))
    for line in report.unproven_lines(model, where, findings):
        report.log.debug(line)
    plan = _Plan({}, report.loud_lines(model, where, findings, _fold))
    # A tie that the config switched off may be meant; unless a row says that the key was missed, too.
    broken = [f for f in findings if f.tie.verdict in report.LOUD and (not f.off or f.tie.key in missing)]
    if mode.current == "strict" and broken:
        plan.failure = report.TieError(report.loud_lines(model, where, broken, _fold)[0], [f.tie for f in broken])
    return set(missing) - {f.tie.key for f in proven}, plan


def _is_failing() -> bool:
    """Whether the report is made on the way out of a failed load (transformers calls it in a `finally`)."""
    flying = sys.exc_info()[1]
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("wrapt"):
        frame = frame.f_back
    # An exception that the user's own code is handling further out has its traceback start further out.
    return flying is not None and flying.__traceback__ is not None and flying.__traceback__.tb_frame is frame


def _bind(wrapped: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_parameters[wrapped.__name__], args, strict=False)), **kwargs}


def _fold(items: list[str]) -> Iterable[str]:
    """Fold numbered keys as the report itself does: `layers.{0, 1}...`."""
    return list(sys.modules[REPORT].update_key_name(items))


def _aside(error: Exception) -> None:
    """Tell that tiedquiet failed; the load goes on as if it were not there."""
    try:
        report.log.warning(
            "tiedquiet stood aside, transformers goes on without it: %s: %s", type(error).__name__, error
        )
    except Exception:
        return


def _once(level: int, message: str) -> None:
    if message not in _said:
        _said.add(message)
        report.say(level, message)


_SEAMS = (
    _Seam(
        REPORT,
        "",
        "log_state_dict_report",
        (frozenset({"model", "loading_info"}), frozenset({"model", "load_config", "missing_keys"})),
        _on_report,
    ),
    _Seam(
        "transformers.modeling_utils", "PreTrainedModel", "_load_pretrained_model", (frozenset({"model"}),), _on_load
    ),
    _Seam("transformers.trainer", "Trainer", "_issue_warnings_after_load", (frozenset({"load_result"}),), _on_resume),
)

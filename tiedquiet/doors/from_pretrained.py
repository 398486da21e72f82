"""The door of transformers' `from_pretrained`, and of its `load_adapter`, which goes through the same functions."""

import copy
import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from tiedquiet import mode
from tiedquiet.doors import adapters, call
from tiedquiet.doors.outcome import Outcome, carry_out, conclude, left_missing
from tiedquiet.doors.wrapping import Seam, add, bind, guarded, is_wrapped, wrap_overrides
from tiedquiet.proof import crossing, names, record
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.load import Load
from tiedquiet.proof.reading import Reading, read
from tiedquiet.proof.repair import copy_in_place, prepare
from tiedquiet.proof.survey import survey
from tiedquiet.proof.unread import ask_headers, find_unread, needs_headers, note_unlisted
from tiedquiet.verdict import Finding

_LOADER = "transformers.modeling_utils"


def _on_load(wrapped: Callable[..., Any], kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `from_pretrained`: what is read in it is watched over until it returns."""
    around = call.current()
    if mode.current() == "off":
        return wrapped(*args, **kwargs)
    if around is not None and around.includes(kind):  # transformers' own, called by that of the class
        return around.attempt(wrapped, args, kwargs)
    return call.Call(kind, is_late=_guard_own(kind)).run(wrapped, args, kwargs)


def _on_subclass(wrapped: Callable[..., Any], kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `__init_subclass__`: a class that has a `from_pretrained` of its own is guarded around that one."""
    result = wrapped(*args, **kwargs)
    _guard_own(kind)
    return result


def _guard_own(kind: Any) -> bool:
    """Guard a `from_pretrained` of a class's own; returns whether it has one that was not guarded until now."""
    with suppress(Exception):  # no class, or none of transformers
        return wrap_overrides(kind, sys.modules[_LOADER].PreTrainedModel, "from_pretrained", _on_load)
    return False


def _on_init(wrapped: Callable[..., Any], kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `get_init_context`, which `from_pretrained` calls just before `__init__`: note what that will be given."""
    result = wrapped(*args, **kwargs)
    around = call.current()
    if around is not None and mode.current() == "repair":
        with suppress(Exception):
            frame: Any = sys._getframe(1)
            while frame.f_globals.get("__name__") != _LOADER:  # wrapt's own, where it is Python, or another wrapper's
                frame = frame.f_back
            given, dtype = frame.f_locals, bind(wrapped, args, kwargs)["dtype"]
            arguments = copy.deepcopy((given["config"], given["model_args"], given["model_kwargs"]))
            around.arguments = kind, dtype, *arguments
    return result


def _on_read(wrapped: Callable[..., Any], _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `_load_pretrained_model`: note what was read, and where it lies, before anything is initialised."""
    around = call.current()
    if around is not None:
        around.was_read = True
        around.end_earlier(bind(wrapped, args, kwargs).get("model"))
    result = wrapped(*args, **kwargs)
    # What cannot be watched afterwards is not judged.
    if mode.current() != "off" and is_wrapped(_FINALIZE):
        _, failure = guarded(lambda: _note(wrapped, bind(wrapped, args, kwargs), result))
        if failure is not None:
            raise failure
    return result


def _on_finalize(wrapped: Callable[..., Any], _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `_finalize_model_loading`: the watch, where no `from_pretrained` is around it or a quantiser follows."""
    model = bind(wrapped, args, kwargs)["model"]
    load = Load.of(model)
    with ExitStack() as entered:
        if load is not None and not load.is_in_call:
            entered.callback(_close, load, model)
            entered.enter_context(load.watch)
        return wrapped(*args, **kwargs)


def _on_last_step(wrapped: Callable[..., Any], _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around a quantiser's `postprocess_model`: it changes tensors for good, and on purpose, so the watch has ended."""
    model, around = bind(wrapped, args, kwargs)["model"], call.current()
    if around is not None:
        around.end_earlier(model)
    result = wrapped(*args, **kwargs)
    with suppress(Exception):
        if around is not None and (known := record.of(model)) is not None:
            record.leave(model, known.renewed(survey(model).state))
    return result


def _close(load: Load, model: Any) -> None:
    with suppress(Exception):  # of a load that failed, or that was judged already
        load.close(model)


def _on_move(wrapped: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `_move_missing_keys_from_meta_to_device`: it makes placeholders, perhaps a million of them."""
    load = Load.of(model)
    if load is None:
        return wrapped(*args, **kwargs)
    before: dict[str, Any] = {}
    try:
        before = load.may_be_replaced(model)
    except Exception as error:
        load.watch.give_up(error)
    with load.watch.aside():
        result = wrapped(*args, **kwargs)
    try:
        load.note_placeholders(model, before)
    except Exception as error:
        load.watch.give_up(error)
    return result


def _on_report(wrapped: Callable[..., Any], _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `log_state_dict_report`: the same report without the rows that are proven false."""

    def decide() -> Outcome | None:
        bound = bind(wrapped, args, kwargs)
        load = Load.of(bound["model"])
        # transformers reports on a load that fails as well. An exception that the program was already handling when
        # it began to load is no such failure.
        if load is None or sys.exc_info()[1] is not load.in_flight:
            return None
        named = bound if "pretrained_model_name_or_path" in bound else vars(bound["load_config"])
        load.where = named.get("pretrained_model_name_or_path")
        if not load.is_in_call:
            reported = _reported(bound)
            earlier, lines = adapters.read_earlier(load, bound["model"], reported)
            load.reported = reported - earlier
            lines += adapters.unreported(load, bound["model"])
            with load.watch.aside():
                base = record.of(bound["model"])
                outcome = conclude(load, bound["model"])
            adapters.note_parted(bound["model"], load.where, base, outcome)
            outcome.lines += lines
            outcome.arguments = _with_missing(bound, outcome.missing)
            return outcome
        try:
            return _filter(load, bound)
        except Exception as error:
            load.watch.give_up(error)  # said when the load has ended
            return None

    return carry_out(decide, wrapped, *args, **kwargs)


def _note(wrapped: Callable[..., Any], bound: dict[str, Any], result: Any) -> None:
    """Note what was read; in `repair`, let transformers read what the files have under other names."""
    if _left_empty():
        return
    model, config = bound["model"], bound["load_config"]
    info, offloaded = result if isinstance(result, tuple) else (result, getattr(result, "disk_offload_index", None))
    base = getattr(model, "base_model_prefix", "")
    checkpoint = Checkpoint(bound.get("state_dict"), bound.get("checkpoint_files"), base)
    mended: list[Finding] = []
    reading, unread = _read(model, info, checkpoint, offloaded, config)
    # peft's names for them say more than what else may be in names.
    rest = adapters.note_names(model, reading, unread) if adapters.is_loading(model) else unread
    others = find_unread(model, reading, rest, config.weight_mapping or ())
    if others and mode.current() == "repair" and reading.may_grow:
        before = reading.found
        also: dict[str, str] = {}
        for made in others:
            if not _lies_in_stored(model, reading, made.origins):
                _read_again(wrapped, bound, info, checkpoint, made)
                also |= made.key_of
        if also:
            reading, unread = _read(model, info, checkpoint, offloaded, config, also)
            mended = [finding for key, finding in before.items() if key in reading.held]
            unread = {name: header for name, header in unread.items() if name not in also}
            find_unread(model, reading, unread, config.weight_mapping or ())
            # What was not read for a doubt has it still, whatever else may be said now that the rest was.
            reading.found |= {key: before[key] for key in before.keys() & reading.missing}
    if mode.current() == "repair" and reading.crossed:
        mended += _uncross(reading)
    load = Load(model, reading, protect=mode.current() == "repair")
    load.mended = mended
    around = call.current()
    load.arguments = around.arguments if around is not None else ()
    if adapters.is_loading(model):  # perhaps with no call around it: so it is judged when transformers reports
        adapters.note_rest(model, reading, unread, [name for made in others for name in made.key_of])
    elif around is not None and (not reading.is_quantised or _is_last_step_seen(config.hf_quantizer)):
        around.watch(load, model)


def _is_last_step_seen(quantiser: Any) -> bool:
    """Whether the watch ends before a quantiser's last step: one with a function of its own for it is not wrapped."""
    owner = next(kind for kind in type(quantiser).__mro__ if _LAST_STEP.names[0] in vars(kind))
    return is_wrapped(_LAST_STEP) and owner.__module__ == _LAST_STEP.module


def _lies_in_stored(model: Any, reading: Reading, keys: Collection[str]) -> bool:
    """Whether one of these keys is a tensor that was read under another name: to read it again would overwrite that."""
    stored, state = set(map(id, reading.held.values())), survey(model).state
    return any(id(state[key]) in stored for key in keys)


def _read(
    model: Any,
    info: Any,
    checkpoint: Checkpoint,
    offloaded: Any,
    config: Any,
    also: dict[str, str] | None = None,
) -> tuple[Reading, names.Headers]:
    """What was read, and what nothing read, if the loader left anything open."""
    in_other_shapes = {entry[0] for entry in info.mismatched_keys}
    missing = in_other_shapes | info.missing_keys
    conversions = list(config.weight_mapping or ())
    is_converted = names.has_converter(conversions)

    def made_of() -> dict[str, names.Origin]:
        of = names.origins if is_converted else names.sources
        return of(model, checkpoint.headers, survey(model).state, conversions)

    reading = read(model, missing, checkpoint, offloaded, made_of, is_converted, config.hf_quantizer is not None)
    reading.may_grow = not reading.is_quantised and "disk" not in (config.device_map or {}).values()
    # The files have values for these, so neither a tie nor what their class computes may pass for them.
    reading.likely.update((key, key) for key in reading.tied & in_other_shapes)
    reading.free -= in_other_shapes
    if adapters.is_loading(model):
        adapters.leave_out_others(model, reading)
    unread: names.Headers = {}
    if also or crossing.may_cross(model) or needs_headers(reading, info.unexpected_keys):
        try:
            unread = ask_headers(model, reading, conversions, also)
        except (ValueError, OSError):  # GGUF, whose names are none of the model's; or what must not be opened
            unread = {}
        note_unlisted(model, reading, conversions)
    if elsewhere := getattr(info, "skipped_pp_keys", None):  # what other processes of a pipeline have read
        known_as = names.renamed(model, unread, conversions, and_merged=True)
        unread = {name: header for name, header in unread.items() if known_as[name] not in elsewhere}
    return reading, unread


def _read_again(
    wrapped: Callable[..., Any],
    bound: dict[str, Any],
    info: Any,
    checkpoint: Checkpoint,
    made: names.Made,
) -> None:
    """Let transformers read what it left, as it reads everything: with its types, devices and conversions."""
    model, config = bound["model"], bound["load_config"]
    if made.conversions:
        given = {made.known_as.get(name, name): checkpoint.tensors[name]() for name in made.key_of}
    else:
        given = {key: checkpoint.tensors[origin.names[0]]() for key, origin in made.origins.items()}
    used = list(getattr(model, "_weight_conversions", None) or ())
    more = wrapped(
        **{
            **bound,
            "state_dict": given,
            "checkpoint_files": None,
            "load_config": replace(config, weight_mapping=list(made.conversions)),
        }
    )
    more = more[0] if isinstance(more, tuple) else more
    by_now = getattr(model, "_weight_conversions", None) or ()
    # Each is undone when the model is saved, and once is enough.
    model._weight_conversions = [*used, *(one for one in by_now if all(one is not other for other in used))]
    info.missing_keys = info.missing_keys & more.missing_keys
    reported = names.renamed(model, checkpoint.headers, list(config.weight_mapping or ()), and_merged=True)
    came_from = made.key_of.keys()
    info.unexpected_keys = info.unexpected_keys - {reported.get(name, name) for name in came_from} - came_from


def _uncross(reading: Reading) -> list[Finding]:
    """Put into each tensor what the files have for it, where the loader mixed up two of them."""
    tensors, made_of = reading.checkpoint.tensors, reading.made_of
    own = {key: name for key, name in reading.crossed.items() if copy_in_place(reading.held[key], tensors[name]())}
    reading.made_of = lambda: {**made_of(), **{key: names.Origin((name,), False) for key, name in own.items()}}
    return [reading.found.pop(key) for key in own]


def _filter(load: Load, bound: dict[str, Any]) -> Outcome | None:
    """The report without the rows of what is in the model after all; what else there is to say is said at the end."""
    load.reported = _reported(bound)
    if mode.current() == "repair" and (load.watch.placeholders or load.reading.has_loose):
        prepare(load, bound["model"])
    missing = left_missing(load, bound["model"]) if load.reported else set()
    return Outcome(arguments=_with_missing(bound, missing)) if missing != load.reported else None


def _reported(bound: dict[str, Any]) -> set[str]:
    info = bound.get("loading_info")
    return set((info.missing_keys if info is not None else bound["missing_keys"]) or ())


def _with_missing(bound: dict[str, Any], missing: set[str]) -> dict[str, Any]:
    info = copy.copy(bound.get("loading_info"))  # the caller gets this very object back by `output_loading_info`
    if info is None:
        return {**bound, "missing_keys": missing}
    info.missing_keys = missing
    return {**bound, "loading_info": info}


def _left_empty() -> bool:
    """Whether this process has no weights yet: FSDP's RAM-efficient loading sends it those of the first one later."""
    own = vars(sys.modules[_LOADER])
    return bool(own.get("is_fsdp_enabled", bool)()) and not own.get("is_local_dist_rank_0", bool)()


def _of_model(names_there: tuple[str, ...], parameters: set[str], hook: Callable[..., Any], **how: bool) -> Seam:
    form = frozenset(parameters)
    return Seam(_LOADER, "PreTrainedModel", names_there, (form,), hook, **how)


_FINALIZE = _of_model(("_finalize_model_loading", "_finalize_load_state_dict"), {"model", "load_config"}, _on_finalize)
_LAST_STEP = Seam(
    "transformers.quantizers.base", "HfQuantizer", ("postprocess_model",), (frozenset({"model"}),), _on_last_step
)
_REPORT = Seam(
    "transformers.utils.loading_report",
    "",
    ("log_state_dict_report",),
    (frozenset({"model", "loading_info"}), frozenset({"model", "load_config", "missing_keys"})),
    _on_report,
)
add(
    _REPORT,
    _of_model(("_load_pretrained_model",), {"model", "load_config"}, _on_read),
    _FINALIZE,
    _LAST_STEP,
    _of_model(("from_pretrained",), {"pretrained_model_name_or_path"}, _on_load, has_overrides=True),
    _of_model(("__init_subclass__",), set(), _on_subclass),
    _of_model(("get_init_context",), {"dtype"}, _on_init),
    _of_model(("_move_missing_keys_from_meta_to_device",), {"self"}, _on_move),
)

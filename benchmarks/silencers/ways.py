"""What people do about the loading report."""

import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from benchmarks.silencers.tables import READING


@contextmanager
def nothing(_: str = "") -> Iterator[None]:
    yield


@contextmanager
def filter_warnings(_: str) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        yield


@contextmanager
def verbosity_error(_: str = "") -> Iterator[None]:
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


@contextmanager
def record_filter(_: str = "") -> Iterator[None]:
    def drop(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


@contextmanager
def ignore_the_key(row: str) -> Iterator[None]:
    from transformers import PreTrainedModel

    before = PreTrainedModel._keys_to_ignore_on_load_missing
    PreTrainedModel._keys_to_ignore_on_load_missing = [re.escape(row)]
    try:
        yield
    finally:
        PreTrainedModel._keys_to_ignore_on_load_missing = before


@contextmanager
def dropping(drop: Callable[[Any, set[str]], set[str]]) -> Iterator[None]:
    """A hand-written shim: the report without the missing keys that `drop` names."""
    from transformers import modeling_utils

    original = modeling_utils.log_state_dict_report

    def report(*args: Any, **kwargs: Any) -> Any:
        model = kwargs.get("model", args[0] if args else None)
        if (info := kwargs.get("loading_info")) is not None:
            before, info.missing_keys = info.missing_keys, info.missing_keys - drop(model, info.missing_keys)
            try:
                return original(*args, **kwargs)
            finally:
                info.missing_keys = before
        missing = set(kwargs["missing_keys"])  # the form of 5.0.0
        return original(*args, **{**kwargs, "missing_keys": missing - drop(model, missing)})

    modeling_utils.log_state_dict_report = report
    try:
        yield
    finally:
        modeling_utils.log_state_dict_report = original


def drop_declared(_: str) -> Any:
    def drop(model: Any, missing: set[str]) -> set[str]:
        patterns = list(model._tied_weights_keys or ())
        return {key for key in missing if any(re.search(pattern, key) for pattern in patterns)}

    return dropping(drop)


def drop_by_is(_: str) -> Any:
    def drop(model: Any, missing: set[str]) -> set[str]:
        state = model.state_dict(keep_vars=True)
        names = Counter(map(id, state.values()))
        return {key for key in missing if names[id(state.get(key))] > 1}

    return dropping(drop)


def tiedquiet_mode(mode: str) -> Callable[[str], Any]:
    def enabled(_: str) -> Any:
        import tiedquiet

        return tiedquiet.enable(mode)

    return enabled


def tie_by_hand(model: Any, _: dict[str, Any]) -> str:
    model.tie_weights()
    return ""


def read_info(_: Any, info: dict[str, Any]) -> str:
    return str([info.get(f"{kind}_keys") for kind in ("missing", "mismatched", "unexpected")])


class Way(NamedTuple):
    """What people do.

    Attributes:
        around: a context manager around the load; it is given the row that they want to be rid of.
        after: what they do with the model and its loading info; returns what that tells them.
    """

    around: Callable[[str], Any]
    after: Callable[[Any, dict[str, Any]], str] | None = None


WAYS = {
    READING: Way(nothing),
    '`warnings.filterwarnings("ignore")`': Way(filter_warnings),
    "`set_verbosity_error()`": Way(verbosity_error),
    "`set_verbosity_error()`, then `model.tie_weights()`": Way(verbosity_error, tie_by_hand),
    "`set_verbosity_error()`, reading `output_loading_info`": Way(verbosity_error, read_info),
    "a filter for LOAD REPORT records": Way(record_filter),
    "the key in `_keys_to_ignore_on_load_missing`": Way(ignore_the_key),
    "dropping what `_tied_weights_keys` covers": Way(drop_declared),
    "an `is` check": Way(drop_by_is),
    "tiedquiet": Way(tiedquiet_mode("on")),
    "tiedquiet, `repair`": Way(tiedquiet_mode("repair")),
    "tiedquiet, `strict`": Way(tiedquiet_mode("strict")),
}

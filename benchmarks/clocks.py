"""Clocks above and below each of tiedquiet's wrappers: its own part of a load is what lies between them."""

import time
from collections.abc import Callable
from functools import wraps
from typing import Any


def _of_class(model: Any) -> Callable[..., Any]:
    """`from_pretrained` as it is now, as a function of the class."""
    whole = vars(model)["from_pretrained"]

    @wraps(whole.__func__)
    def call(kind: Any, *args: Any, **kwargs: Any) -> Any:
        return whole.__get__(None, kind)(*args, **kwargs)

    return call


class Clocks:
    """Seconds that were spent in transformers' functions with tiedquiet's wrappers, and below them, since `clear`.

    tiedquiet is on from here on. What its watch costs shows in transformers' own time; `watched` counts the operations
    that it looked at, and `watching` the seconds that they took, their own work included.
    """

    def __init__(self) -> None:
        import tiedquiet
        from tiedquiet.proof.watch import Watch

        self.below: dict[str, float] = {}
        self.above: dict[str, float] = {}
        self.watching = 0.0
        self.watched = 0
        tiedquiet.disable()
        self._put(self.below)
        tiedquiet.enable("on")
        self._put(self.above)
        dispatch = Watch.__torch_dispatch__

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return dispatch(*args, **kwargs)
            finally:
                self.watching += time.perf_counter() - start
                self.watched += 1

        Watch.__torch_dispatch__ = timed  # type: ignore[method-assign]

    def clear(self) -> None:
        self.below.clear()
        self.above.clear()
        self.watching, self.watched = 0.0, 0

    @property
    def own(self) -> float:
        """Seconds in tiedquiet's own code, outside the operations that it watched."""
        return sum(seconds - self.below[name] for name, seconds in self.above.items())

    def _put(self, clocks: dict[str, float]) -> None:
        """Put a clock around each function as it is now, tiedquiet's wrapper included."""
        from transformers import modeling_utils
        from transformers.utils import loading_report

        model = modeling_utils.PreTrainedModel
        report = self._clock(clocks, "report", modeling_utils.log_state_dict_report)
        loading_report.log_state_dict_report = modeling_utils.log_state_dict_report = report
        for name in ("_load_pretrained_model", "_finalize_model_loading"):
            setattr(model, name, staticmethod(self._clock(clocks, name, getattr(model, name))))
        # What it takes in there lies above the clocks of the others, and is not counted twice.
        model.from_pretrained = classmethod(self._clock(clocks, "from_pretrained", _of_class(model)))
        move = "_move_missing_keys_from_meta_to_device"
        setattr(model, move, self._clock(clocks, move, getattr(model, move)))

    @staticmethod
    def _clock(clocks: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                clocks[name] = clocks.get(name, 0.0) + time.perf_counter() - start

        return timed


class OfResume(Clocks):
    """The same around what a `Trainer` calls when it resumes."""

    def _put(self, clocks: dict[str, float]) -> None:
        from transformers import Trainer

        for name in ("_load_from_checkpoint", "_issue_warnings_after_load"):
            setattr(Trainer, name, self._clock(clocks, name, getattr(Trainer, name)))

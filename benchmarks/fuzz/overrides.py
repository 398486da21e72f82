"""The methods that a drawn class overrides, so that its code runs at a moment of the load."""

from typing import Any

from transformers import PreTrainedModel

FINALIZE = next(
    name for name in ("_finalize_model_loading", "_finalize_load_state_dict") if name in vars(PreTrainedModel)
)


def add(body: dict[str, Any], moment: str) -> None:
    """Add to the body of a class what the moment needs; several moments can need one method."""
    if moment in _NEEDS:
        name, method = _NEEDS[moment]
        earlier = body.get(name)
        body[name] = method(earlier)


def _tie_weights(earlier: Any) -> Any:
    def tie_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        (earlier or PreTrainedModel.tie_weights)(self, *args, **kwargs)
        self.act("tie_weights")

    return tie_weights


def _load(earlier: Any) -> Any:
    def _load_pretrained_model(cls: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = PreTrainedModel._load_pretrained_model(model, *args, **kwargs)
        model.act("after _load_pretrained_model")
        return result

    return classmethod(_load_pretrained_model)


def _finalize(before: bool) -> Any:
    def override(earlier: Any) -> Any:
        original = earlier.__func__ if earlier is not None else getattr(PreTrainedModel, FINALIZE)

        def _finalize_model_loading(model: Any, *args: Any, **kwargs: Any) -> Any:
            if before:
                model.act("before _finalize_model_loading")
            result = original(model, *args, **kwargs)
            if not before:
                model.act("after _finalize_model_loading")
            return result

        return staticmethod(_finalize_model_loading)

    return override


def _train(moment: str) -> Any:
    def override(earlier: Any) -> Any:
        def train(self: Any, mode: bool = True) -> Any:
            result = (earlier or PreTrainedModel.train)(self, mode)
            if not mode:
                self.act(moment)
            return result

        return train

    return override


def _eval(earlier: Any) -> Any:
    def eval(self: Any) -> Any:
        result = PreTrainedModel.eval(self)
        self.act("eval")
        return result

    return eval


def _from_pretrained(earlier: Any) -> Any:
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        result = super(cls, cls).from_pretrained(*args, **kwargs)
        result[0].act("after super() of from_pretrained")
        return result

    return classmethod(from_pretrained)


_NEEDS: dict[str, tuple[str, Any]] = {
    "tie_weights": ("tie_weights", _tie_weights),
    "after _load_pretrained_model": ("_load_pretrained_model", _load),
    "before _finalize_model_loading": (FINALIZE, _finalize(True)),
    "after _finalize_model_loading": (FINALIZE, _finalize(False)),
    "eval": ("eval", _eval),
    "train": ("train", _train("train")),
    "after super() of from_pretrained": ("from_pretrained", _from_pretrained),
}

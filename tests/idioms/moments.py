"""Writes after reading: in `eval()`, in overridden functions of the load."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tests.idioms.tiny import Tiny, idiom


class Merging(nn.Linear):
    """loralib's: what was trained beside a weight is added to it in evaluation."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.low = nn.Parameter(torch.zeros(size))
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if not mode and not self.merged and not self.weight.is_meta:
            self.weight.data += torch.outer(self.low, self.low)
            self.merged = True
        return self


@idiom()
class MergesInEval(Tiny):
    """`from_pretrained` calls `eval()` last."""

    def add(self, config: Any) -> None:
        self.lin = Merging(config.hidden_size)


@idiom()
class WritesAfterReading(Tiny):
    """Overrides the function that reads, and writes once it has read."""

    @classmethod
    def _load_pretrained_model(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = super()._load_pretrained_model(model, *args, **kwargs)
        model.lin.weight.data.zero_()
        return result


@idiom()
class WritesBeforeTheReport(Tiny):
    """Overrides the function that finishes, and writes before it does."""

    @staticmethod
    def _finalize_model_loading(model: Any, *args: Any, **kwargs: Any) -> Any:
        model.lin.weight.data.zero_()
        return PreTrainedModel._finalize_model_loading(model, *args, **kwargs)

    @staticmethod
    def _finalize_load_state_dict(model: Any, *args: Any, **kwargs: Any) -> Any:  # 5.0.0
        model.lin.weight.data.zero_()
        return PreTrainedModel._finalize_load_state_dict(model, *args, **kwargs)


@idiom()
class WritesInItsOwnFromPretrained(Tiny):
    """Overrides `from_pretrained` itself."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        result = super().from_pretrained(*args, **kwargs)
        (result[0] if isinstance(result, tuple) else result).part.weight.data[3:].mul_(2)
        return result

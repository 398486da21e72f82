"""The moving average of a student's weights, also if FSDP gives each process a part of them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from tiedquiet.distill.speed import whole


class Average(EMAModel):  # type: ignore[misc, unused-ignore] # diffusers ships no types
    """diffusers' own, in parts where the weights are; what it keeps in a checkpoint is whole."""

    shadow_params: list[Tensor]

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint; all processes must ask."""
        return {**super().state_dict(), "shadow_params": [whole(average) for average in self.shadow_params]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint; each process takes its part of what is whole there."""
        parts = self.shadow_params
        super().load_state_dict(state_dict)
        self.shadow_params = [
            distribute_tensor(average.to(part.device), part.device_mesh, part.placements)
            if isinstance(part, DTensor)
            else average
            for part, average in zip(parts, self.shadow_params, strict=True)
        ]

    @contextmanager
    def shown_in(self, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
        """Give parameters their averages, and then what they had, which waits in main memory.

        Not by `store` and `restore`, which would leave parts of other processes' making on another device.
        """
        own = list(parameters)
        kept = [_part(parameter).to("cpu", copy=True) for parameter in own]
        try:
            for parameter, average in zip(own, self.shadow_params, strict=True):
                _part(parameter).copy_(_part(average))
            yield
        finally:
            for parameter, before in zip(own, kept, strict=True):
                _part(parameter).copy_(before)


def _part(tensor: Tensor) -> Tensor:
    """The memory of what this process has of it."""
    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor.detach()

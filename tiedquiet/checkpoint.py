"""What a checkpoint's files hold, tensor by tensor."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open


class Checkpoint:
    """The tensors that a load reads from, under the names of the model.

    Args:
        state_dict: the tensors themselves, where the caller handed them over.
        files: paths of `.safetensors` or `.bin` files, where not.
        base: the prefix that a model with a head puts before the names of its base model.
    """

    def __init__(self, state_dict: Mapping[str, Any] | None, files: Sequence[str] | None, base: str = "") -> None:
        self._state_dict = state_dict
        self._files = list(files or ())
        self._base = f"{base}." if base else ""

    def read(self, name: str) -> torch.Tensor | None:
        """The stored values of one of the model's tensors; None where no file has it under a name that can be told."""
        shorter = [name.removeprefix(self._base)] if self._base else []
        for key in dict.fromkeys((name, *shorter, self._base + name)):
            if (value := self._find(key)) is not None:
                return value
        return None

    def _find(self, key: str) -> torch.Tensor | None:
        if self._state_dict is not None:
            value = self._state_dict.get(key)
            return value if isinstance(value, torch.Tensor) else None
        for path in self._files:
            if path.endswith(".safetensors"):
                with safe_open(path, "pt") as file:
                    if key in file.keys():  # noqa: SIM118 (it is no mapping)
                        tensor: torch.Tensor = file.get_tensor(key)
                        return tensor
            else:
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                if key in tensors:
                    return torch.as_tensor(tensors[key])
        return None

"""What a checkpoint's files hold, tensor by tensor."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


class Checkpoint:
    """The tensors that a load reads from. Opened when they are first asked for, and each read when it is.

    Args:
        state_dict: the tensors themselves, where the caller handed them over.
        files: paths of `.safetensors` or `.bin` files, where not.
        base: the prefix that a model with a head puts before the names of its base model.
    """

    def __init__(
        self, state_dict: Mapping[str, Any] | None = None, files: Sequence[str] | None = None, base: str = ""
    ) -> None:
        self.state_dict = state_dict
        self.files = list(files or ())
        self._base = f"{base}." if base else ""

    @cached_property
    def tensors(self) -> dict[str, Callable[[], torch.Tensor]]:
        """What reads each tensor, under the name that the file has for it.

        Raises:
            Exception: a file cannot be opened.
        """
        if self.state_dict is not None:
            return {key: partial(_itself, value) for key, value in self.state_dict.items() if torch.is_tensor(value)}
        return dict(pair for path in self.files for pair in _open(path))

    def names_of(self, name: str) -> Iterator[str]:
        """The names that files have for one of the model's tensors, unless they were renamed: its own comes first."""
        for key in dict.fromkeys((name, name.removeprefix(self._base), self._base + name)):
            if key in self.tensors:
                yield key

    def read(self, name: str) -> torch.Tensor | None:
        """The stored values of one of the model's tensors; None where no file has it under a name that can be told."""
        key = next(self.names_of(name), None)
        return None if key is None else self.tensors[key]()


def _open(path: str) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    if Path(path).suffix == ".safetensors":
        file: Any = safe_open(path, "pt")  # mapped until the last reference to it goes
        yield from ((key, partial(file.get_tensor, key)) for key in file.keys())  # noqa: SIM118 (it is no mapping)
        return
    if Path(path).suffix == ".gguf":
        raise ValueError(f"{Path(path).name} is a GGUF file, whose values are changed while they are read")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the form before torch 1.6 cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    yield from ((key, partial(_itself, value)) for key, value in tensors.items() if torch.is_tensor(value))


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor

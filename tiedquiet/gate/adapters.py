"""Compares an adapter in memory with the folder it was saved to, under the names that peft gives its tensors there."""

import warnings
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from tiedquiet.gate.printing import few
from tiedquiet.gate.refusal import CannotCheck
from tiedquiet.gate.weights import OF_ADAPTERS
from tiedquiet.proof.adapted import PREFIX
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.memory import identical, plain
from tiedquiet.verdict import Finding, Proof, Verdict

T = TypeVar("T")


class WithAdapter(Checkpoint):
    """The files of a model and of its adapter, if it has one: what has the same name in both is two tensors.

    Args:
        files: their paths.
        base: as of any checkpoint.
        adapted: the names of what the adapter brought, or has read in the place of what the model had.
    """

    def __init__(self, files: list[str], base: str, adapted: Collection[str]) -> None:
        super().__init__(None, files, base)
        self._adapted = adapted
        self._parts = [
            Checkpoint(None, [path for path in files if (Path(path).name in OF_ADAPTERS) is is_adapter])
            for is_adapter in (False, True)
        ]

    @cached_property
    def headers(self) -> dict[str, torch.Tensor]:
        return _both(*(part.headers for part in self._parts))

    @cached_property
    def tensors(self) -> dict[str, Callable[[], torch.Tensor]]:
        return _both(*(part.tensors for part in self._parts))

    def names_of(self, name: str) -> Iterator[str]:
        key = PREFIX + name
        return iter([key]) if name in self._adapted and key in self.tensors else super().names_of(name)


def _both(own: dict[str, T], adapter: dict[str, T]) -> dict[str, T]:
    return {**own, **{PREFIX * (name in own) + name: value for name, value in adapter.items()}}


def check_adapter(model: Any, adapters: list[str], files: list[str], path: str) -> Proof:
    """Compare the adapter that is active with an adapter's files.

    Args:
        model: peft's, or one of transformers or diffusers that has adapters.
        adapters: their names.
        files: where the folder has an adapter.
        path: the folder.

    Raises:
        CannotCheck: the files cannot be read, or it is not clear which adapter is meant.
    """
    from peft import get_peft_model_state_dict

    if len(adapters) > 1:
        active = _active(model)
        if len(active) != 1:
            raise CannotCheck(f"the model has {len(adapters)} adapters, {', '.join(adapters)}; activate one of them")
        adapters = active
    name = adapters[0]
    checkpoint = Checkpoint(None, files)
    try:
        stored = checkpoint.tensors
    except Exception as error:
        raise CannotCheck(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    ours = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if hasattr(model, "get_input_embeddings"):  # which peft saves as well, or was told to: the file says whether it did
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            more = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=True)
        ours |= {key: tensor for key, tensor in more.items() if {key, PREFIX + key} & stored.keys()}
    findings, held, used = [], 0, set()
    for key, tensor in sorted(ours.items()):
        in_files = next((known for known in (key, PREFIX + key) if known in stored), None)
        if in_files is None:
            findings.append(Finding(key, Verdict.MISSING))
            continue
        used.add(in_files)
        values = stored[in_files]()
        pieces = plain(tensor)
        if len(pieces) == 1 and identical(pieces[0], values):
            held += 1
        else:
            findings.append(Finding(key, Verdict.OVERWRITTEN, in_files, "differs from the file", True))
    if left := sorted(stored.keys() - used):
        why = f"{len(left):,} of {len(stored):,} tensors of the files have no place in it: {few(left)}"
        findings.insert(0, Finding("", Verdict.UNREAD, left[0], why, True))
    return Proof(f"{type(model).__name__}, adapter {name}", held, tuple(findings), len(ours))


def _active(model: Any) -> list[str]:
    """The names of the adapters that are active, for which peft has a property and diffusers a method."""
    active = model.active_adapters
    return list(active() if callable(active) else active)

"""Which of a model's tensors belong to an adapter that peft put into it."""

import torch

from tiedquiet.proof.survey import survey


def names_in_files(base: torch.nn.Module, adapter: str) -> dict[str, str]:
    """An adapter's tensors in its base model, each with its name in the files: without the adapter's own.

    An adapter may be called `0` or `weight`, as a part of the names of others is. Its tensors are those that lie under
    its name in a dictionary of a layer of peft's.
    """
    modules = dict(base.named_modules(remove_duplicate=False))
    found = {}
    for key in survey(base).state:
        parts = key.split(".")
        for place in (place for place, part in enumerate(parts) if part == adapter and place):
            holder, owner = modules[".".join(parts[:place])], modules[".".join(parts[: place - 1])]
            if _is_peft_s(owner) and adapter in getattr(holder, "keys", tuple)():
                found[key] = without(parts, place)
    return found


def _is_peft_s(module: torch.nn.Module) -> bool:
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def without(parts: list[str], place: int) -> str:
    """A name without the adapter's own name, which peft inserts at this place."""
    return ".".join(parts[: place - (parts[place - 1] == "modules_to_save")] + parts[place + 1 :])

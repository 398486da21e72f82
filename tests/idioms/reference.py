"""A model that holds the file and was never loaded, and whether a loaded one computes the same."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from tests.idioms.tiny import Idiom, Tiny
from tests.idioms.truths import places, same, truth


def reference_with(idiom: Idiom, model: "Tiny", file: Mapping[str, torch.Tensor]) -> "Tiny":
    """A model built on the CPU that holds the file, and what `model` drew where nobody could know better."""
    reference = idiom.build()
    found = truth(model, file, reference, idiom.architectures)
    meant = {key: file[min(ends)] for key, ends in found.ties.items() if ends and key in found.asked}
    spots = {key: places(value) for key, value in reference.state_dict(keep_vars=True).items()}
    apart = {a for a in file for b in file if spots[a] == spots[b] and not same(file[a], file[b])}
    drawn = model.state_dict().keys() - file.keys() - meant.keys() - found.unwritten
    for key, value in {**model.state_dict(), **file}.items():
        prefix, _, name = key.rpartition(".")
        if key in apart | drawn and isinstance(getattr(reference.get_submodule(prefix), name), nn.Parameter):
            # A tensor of its own: the file must not flow into it, nor one of its tensors into another.
            setattr(reference.get_submodule(prefix), name, nn.Parameter(value.clone()))
    _fill(reference, {**meant, **file})
    if idiom.cls.tie_weights is not PreTrainedModel.tie_weights:
        reference.tie_weights()
        _fill(reference, {**meant, **file})  # what an override wrote on its way
    return reference


def _fill(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    now = model.state_dict(keep_vars=True)
    for key, value in values.items():
        if now[key].shape == value.shape:
            now[key].data.copy_(value)


def outputs_agree(idiom: Idiom, model: "Tiny", file: Mapping[str, torch.Tensor]) -> bool:
    """Whether a model gives, to the bit, what one gives that was built on the CPU and holds the file."""
    ids = torch.arange(22).view(2, 11)
    with torch.no_grad():
        return same(model(ids), reference_with(idiom, model, file)(ids))

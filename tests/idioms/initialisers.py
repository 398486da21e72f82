"""Initialisers that draw, scale or replace what was read."""

import math

import torch
from torch import nn

from tests.idioms.tiny import Part, ScaledEmbedding, Tiny, idiom


@idiom()
@idiom("EverythingThroughData in bfloat16", dtype=torch.bfloat16)
@idiom("EverythingThroughData, lin.bias missing", missing=("lin.bias",))
class EverythingThroughData(Tiny):
    """GPT-NeoX and nearly every file of version 4."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if module.padding_idx is not None:
                module.weight.data[module.padding_idx].zero_()
        elif isinstance(module, Part):
            module.weight.data.normal_(mean=0.0, std=0.02)
            module.reset()


@idiom()
@idiom("BesideABuffer in bfloat16", dtype=torch.bfloat16)
class BesideABuffer(Tiny):
    """A module that owns a weight and a causal mask: the smallest loss that no release prevents."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            module.weight.data.normal_()


@idiom(missing=("lin.bias",))
class MissingSibling(Tiny):
    """Adapters and heads with a bias of their own: the weight goes with the bias that the file lacks."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.uniform_(-0.1, 0.1)
            if module.bias is not None:
                module.bias.data.zero_()
        else:
            super()._init_weights(module)


@idiom()
class ZeroesReservedRows(Tiny):
    """Reserved tokens start at zero: a slice of an embedding."""

    embedding = ScaledEmbedding

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            module.weight.data[-3:].zero_()


@idiom(config={"padding_idx": 1})
class ZeroesAnotherRow(Tiny):
    """One row, and not the padding row."""

    embedding = ScaledEmbedding

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            module.weight.data[2].zero_()


@idiom(config={"padding_idx": 1})
@idiom("ZeroesThePaddingRow in bfloat16", config={"padding_idx": 1}, dtype=torch.bfloat16)
@idiom("ZeroesThePaddingRow, tied", config={"padding_idx": 1, "tie_word_embeddings": True}, missing=("head.weight",))
class ZeroesThePaddingRow(Tiny):
    """As transformers does for Kosmos 2, up to 5.20.2; this is a user's class, and the file has other values there."""

    embedding = ScaledEmbedding
    _tied_weights_keys = {"head.weight": "embed.weight"}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight.data[module.padding_idx].zero_()


@idiom(config={"pad_token_id": 3})
class ZeroesThePadTokenOfTheConfig(Tiny):
    """The row of a token that only the config calls padding."""

    embedding = ScaledEmbedding

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            module.weight.data[self.config.pad_token_id].zero_()


@idiom(config={"padding_idx": 1})
class DrawsAndZeroesThePaddingRow(Tiny):
    """BERT of version 4: the padding row is zeroed again, and the rest is drawn anew."""

    embedding = ScaledEmbedding

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(std=0.02)
            module.weight.data[module.padding_idx].zero_()


@idiom()
class Halves(Tiny):
    """BEiT: scaled by depth where it lies."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            module.weight.data.div_(math.sqrt(2.0))


@idiom()
class InPlaceUnderNoGrad(Tiny):
    """Files that come from plain PyTorch."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            with torch.no_grad():
                module.weight.copy_(torch.eye(module.weight.shape[0]))


@idiom()
class SharesAndDraws(Tiny):
    """For other processes the memory is moved, and then written to where it lies now."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            self.get_input_embeddings().weight.detach()
            module.weight.share_memory_()
            module.weight.data.normal_()


@idiom()
class SwapsData(Tiny):
    """Mamba and others: `.data` becomes another tensor."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            module.weight.data = torch.randn_like(module.weight)


@idiom()
class ReplacesTheParameter(Tiny):
    """The parameter itself becomes another."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            module.weight = nn.Parameter(torch.eye(module.weight.shape[0]))


@idiom()
class SwapsDataAndReplaces(Tiny):
    """Both, one after the other."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            module.weight.data = torch.randn_like(module.weight)
            module.weight = nn.Parameter(module.weight.data)

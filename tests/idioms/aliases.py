"""One module under two names."""

from typing import Any

import torch
from torch import nn

from tests.idioms.tiny import ScaledEmbedding, Tiny, idiom


class Shares(Tiny):
    def add(self, config: Any) -> None:
        self.decoder = nn.Module()
        self.decoder.embed = self.embed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + self.head(self.decoder.embed(ids))


@idiom(missing=("decoder.embed.weight",))
@idiom("OneModuleTwoNames, the first missing", missing=("embed.weight",))
@idiom("OneModuleTwoNames, neither stored", missing=("embed.weight", "decoder.embed.weight"))
@idiom("OneModuleTwoNames, both stored and equal")
@idiom("OneModuleTwoNames, both stored and different", different=("decoder.embed.weight",))
class OneModuleTwoNames(Shares):
    """Encoder and decoder share the embedding module: on some releases what was loaded is drawn anew."""


@idiom(missing=("decoder.embed.weight",))
@idiom("SharedModuleThroughData, both stored and different", different=("decoder.embed.weight",))
class SharedModuleThroughData(Shares):
    """The same under an initialiser of version 4."""

    embedding = ScaledEmbedding

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(std=0.02)

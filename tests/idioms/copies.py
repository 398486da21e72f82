"""Where a tie is asked for, a tensor of its own: equal, scaled, longer, drawn anew."""

from typing import Any

from torch import nn
from transformers import initialization as init

from tests.idioms.ties import AskedForByTheConfigAlone, Clones, Declares
from tests.idioms.tiny import HEADLESS, ScaledEmbedding, Tiny, idiom


@idiom(**HEADLESS)
class ClonesUndeclared(Clones):
    """The same, known by the config alone."""

    _tied_weights_keys = None


@idiom(**HEADLESS)
class CopiesInto(Declares):
    """The values are copied into the head's own memory."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight.data.copy_(self.embed.weight.data)


@idiom(**HEADLESS)
class CopiesIntoUndeclared(CopiesInto):
    """The same, known by the config alone: only then has version 5 given the head a memory."""

    _tied_weights_keys = None


@idiom(**HEADLESS)
class ClonesAndScales(Declares):
    """MiniCPM-like scaling folded into a copy: other values."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight = nn.Parameter(self.embed.weight.data * 0.5)


@idiom(**HEADLESS)
class ClonesAllButOne(Declares):
    """A copy with one element changed."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight = nn.Parameter(self.embed.weight.clone())
        self.head.weight.data[5, 5] += 1.0


@idiom(**HEADLESS, filled={"embed.weight": 0.0})
class EqualByBeingZero(AskedForByTheConfigAlone):
    """Two tensors that are equal because both are zero: no tie, and no proof of one."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.head:
            init.zeros_(module.weight)


@idiom(**HEADLESS)
class AppendsRows(Declares):
    """New tokens have rows of their own behind the embedding's."""

    def add(self, config: Any) -> None:
        self.head = nn.Linear(config.hidden_size, config.vocab_size + 2, bias=False)

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight.data[: self.config.vocab_size] = self.embed.weight.data


@idiom(**HEADLESS)
class AppendsRowsUndeclared(AppendsRows):
    """The same, declared by nobody: a head that happens to begin like the embedding."""

    _tied_weights_keys = None


@idiom(**HEADLESS)
class EmbeddingWithinTheHead(Tiny):
    """The embedding becomes a view of a larger head, of which the file has a part."""

    def add(self, config: Any) -> None:
        self.head = nn.Linear(config.hidden_size, config.vocab_size + 2, bias=False)

    def tie_weights(self, *_: Any, **__: Any) -> None:
        size = self.config.vocab_size
        self.head.weight.data[:size] = self.embed.weight.data
        self.embed.weight = nn.Parameter(self.head.weight.data[:size])


@idiom(**HEADLESS)
class ClonedAndDrawnAnew(Clones):
    """Equal to what the embedding now is, and not to what the file has."""

    embedding = ScaledEmbedding

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(std=0.02)

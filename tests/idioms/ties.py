"""Ways to declare a tie and to make it."""

from typing import Any

import torch
from torch import nn

from tests.idioms.tiny import HEADLESS, ScaledEmbedding, Tiny, idiom


@idiom(**HEADLESS)
@idiom("Declares in bfloat16", **HEADLESS, dtype=torch.bfloat16)
@idiom("Declares, both ends stored", config={"tie_word_embeddings": True}, different=("head.weight",))
@idiom("Declares, neither end stored", missing=("head.weight", "embed.weight"), config={"tie_word_embeddings": True})
@idiom("Declares, stored under the target's name", missing=("embed.weight",), config={"tie_word_embeddings": True})
@idiom("Declares, the flag off", missing=("head.weight",))
@idiom("Declares, the flag off, a base model's file", missing=("head.weight",), architectures=("TinyModel",))
class Declares(Tiny):
    """Written right for version 5."""

    _tied_weights_keys: Any = {"head.weight": "embed.weight"}  # noqa: RUF012


class Overrides(Tiny):
    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight = self.embed.weight


@idiom(**HEADLESS)
class DeclaresNone(Overrides):
    """Ties in `tie_weights`, and tells nobody: the commonest source of a false row."""

    _tied_weights_keys = None


@idiom(**HEADLESS)
class DeclaresEmpty(Overrides):
    """The same with an empty dict."""

    _tied_weights_keys: Any = {}  # noqa: RUF012


@idiom(missing=("head.weight",))
class DeclaresAList(Overrides):
    """The declaration of version 4, which 5 takes only while the flag is false."""

    _tied_weights_keys: Any = ["head.weight"]  # noqa: RUF012


@idiom(**HEADLESS)
class DeclaresByProperty(Tiny):
    """Composite models: the declaration is computed."""

    @property
    def _tied_weights_keys(self) -> Any:
        return {"head.weight": "embed.weight"}

    @_tied_weights_keys.setter
    def _tied_weights_keys(self, _: Any) -> None:
        pass


@idiom(**HEADLESS)
class AskedForByTheConfigAlone(Tiny):
    """`_tied_weights_keys = None`, the usual answer to the crash over a list: the head stays random."""

    _tied_weights_keys = None


@idiom(**HEADLESS)
class DoesNothing(Declares):
    """`tie_weights` is emptied because it crashed."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        pass


@idiom(**HEADLESS)
class TiesInInit(Tiny):
    """nanoGPT: tied in `__init__`, where version 5 has only placeholders."""

    def add(self, config: Any) -> None:
        self.embed.weight = self.head.weight


@idiom(missing=("twin.weight",))
class TwinOfInit(Tiny):
    """Two layers tied in `__init__`, declared by nobody."""

    def add(self, config: Any) -> None:
        self.twin = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.twin.weight = self.lin.weight

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.twin(x)


@idiom(**HEADLESS)
class TiesTheWrongWay(Tiny):
    """nanoGPT's order in `tie_weights`: what was loaded becomes what was drawn."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.embed.weight = self.head.weight


@idiom(**HEADLESS)
class CopiesTheWrongWay(Tiny):
    """The same by copying."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.embed.weight.data.copy_(self.head.weight.data)


@idiom(**HEADLESS)
class TiesMemory(Tiny):
    """Two parameters over one memory."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight = nn.Parameter(self.embed.weight.data)


@idiom(**HEADLESS)
class TiesByData(Tiny):
    """`.data` of one is `.data` of the other."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight.data = self.embed.weight.data


@idiom(**HEADLESS)
class TiesASlice(Tiny):
    """A head without the reserved rows: a view of the embedding."""

    def add(self, config: Any) -> None:
        self.head = nn.Linear(config.hidden_size, config.vocab_size - 3, bias=False)

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight = nn.Parameter(self.embed.weight.data[3:])


class TransposedHead(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.hidden_size, config.vocab_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


@idiom(**HEADLESS)
class TiesTransposed(Declares):
    """Ports from TensorFlow: the head is the transposed embedding, a view of it."""

    def add(self, config: Any) -> None:
        self.head = TransposedHead(config)

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight = nn.Parameter(self.embed.weight.data.t())


@idiom(**HEADLESS)
class CopiesTransposed(TiesTransposed):
    """The same, made contiguous: a tensor of its own with the right values."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight = nn.Parameter(self.embed.weight.data.t().contiguous())


class ConvHead(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.vocab_size, config.hidden_size, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv1d(x.transpose(1, 2), self.weight).transpose(1, 2)


@idiom(**HEADLESS)
class TiesReshaped(Declares):
    """Speech models: a convolution of width one over the embedding."""

    def add(self, config: Any) -> None:
        self.head = ConvHead(config)

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight = nn.Parameter(self.embed.weight.data[:, :, None])


@idiom(**HEADLESS)
class Clones(Declares):
    """`torchscript` of version 4: equal values in two tensors."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight = nn.Parameter(self.embed.weight.clone())


@idiom(missing=("inner.head.weight",), config={"tie_word_embeddings": True})
class Delegates(Tiny):
    """Multimodal models: the language model inside ties."""

    _tied_weights_keys = None

    def add(self, config: Any) -> None:
        self.inner = DeclaresNone(config)

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.inner.tie_weights()

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + self.inner(ids)


@idiom(missing=("inner.head.weight",), config={"tie_word_embeddings": True})
class DelegatesToADeclaration(Delegates):
    """The model inside declares, and the one outside does nothing."""

    def add(self, config: Any) -> None:
        self.inner = Declares(config)

    def tie_weights(self, *_: Any, **__: Any) -> None:
        pass


@idiom(missing=("left.weight", "right.weight"))
class TiesManyHeads(Tiny):
    """Medusa and multi-codebook models: heads tied in a loop."""

    def add(self, config: Any) -> None:
        self.left = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.right = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def tie_weights(self, *_: Any, **__: Any) -> None:
        for head in (self.left, self.right):
            head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.lin(self.embed(ids))
        return super().forward(ids) + self.left(x) + self.right(x)


@idiom(**HEADLESS)
class TiedAndDrawnAnew(DeclaresNone):
    """The tie holds, and what it is tied to is lost."""

    embedding = ScaledEmbedding

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(std=0.02)


@idiom(**HEADLESS)
class TiedAndMostlyZeroed(DeclaresNone):
    """Sixty of a hundred rows are zero: not a padding row."""

    embedding = ScaledEmbedding

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            module.weight.data[: module.num_embeddings * 6 // 10] = 0.0


@idiom(**HEADLESS)
class WritesInTieWeights(DeclaresNone):
    """`tie_weights` resets a row on its way."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        super().tie_weights()
        self.embed.weight.data[4] = 0.5

"""Buffers and parameters that are filled in part, in steps, by other means or by nobody."""

import threading
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import initialization as init

from tests.idioms.remote_code import Rotary, rotary
from tests.idioms.tiny import Tiny, idiom


@idiom()
class FilledInPart(Tiny):
    """Tables whose special rows are left to `__init__`."""

    def add(self, config: Any) -> None:
        self.register_buffer("table", torch.arange(12.0).view(4, 3), persistent=False)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            self.table[1:].copy_(torch.arange(3.0, 12.0).view(3, 3))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table.sum()


@idiom()
class ComputesFromWhatNobodyWrote(FilledInPart):
    """Rotary tables that the initialiser makes of frequencies that only `__init__` computed."""

    def add(self, config: Any) -> None:
        self.register_buffer("inv", torch.arange(1.0, 4.0), persistent=False)
        for name in ("table", "sines", "turned"):
            self.register_buffer(name, torch.zeros(4, 3), persistent=False)
        self.fill()

    def fill(self) -> None:
        angles = torch.outer(torch.arange(4.0), self.inv)
        self.table.copy_(torch.cat([angles.cos()[:2], angles.cos()[2:]]))
        self.sines = angles.sin() * 2
        self.turned.zero_().add_(self.sines.flip(0)[torch.tensor([0, 2, 1, 3])])

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self:
            self.fill()


@idiom()
class TableOfNumpy(Tiny):
    """A table that is on the CPU from the start, as what comes from numpy is, and is allocated anew all the same."""

    def add(self, config: Any) -> None:
        self.register_buffer("table", torch.from_numpy(np.arange(12, dtype=np.float32).reshape(4, 3)), persistent=False)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table.sum()


@idiom()
class BufferThroughDlpack(FilledInPart):
    """Filled through another tensor of the same memory."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self and not self.table.is_meta:
            torch.from_dlpack(self.table).copy_(torch.arange(12.0).view(4, 3))


@idiom()
class BufferByAThread(FilledInPart):
    """Filled by another thread, which torch does not count."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self and not self.table.is_meta:
            thread = threading.Thread(target=lambda: self.table.data.copy_(torch.arange(12.0).view(4, 3)))
            thread.start()
            thread.join()


@idiom()
class ZerosThroughNumpy(FilledInPart):
    """Zeros where fresh memory is zero already."""

    def add(self, config: Any) -> None:
        self.register_buffer("table", torch.zeros(1 << 20), persistent=False)

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self and not self.table.is_meta:
            self.table.numpy().fill(0)


class Numbers(FilledInPart):
    """Whole numbers, of which none is NaN."""

    def add(self, config: Any) -> None:
        self.register_buffer("table", torch.arange(300).view(100, 3), persistent=False)


@idiom()
class FilledInPartByAnIndex(Numbers):
    """The special rows have a number each; the others are left to `__init__`."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self:
            self.table[torch.tensor([0, 2])] = torch.arange(6).view(2, 3)


@idiom()
class FilledByAMaskAndItsInverse(Numbers):
    """In full, in two steps of which neither says where it wrote but by its mask."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self:
            right = torch.arange(300).view(100, 3)
            self.table.masked_scatter_(right % 2 == 0, right[right % 2 == 0])
            self.table[right % 2 == 1] = right[right % 2 == 1]


@idiom()
class FilledInPartByAThread(Numbers):
    """Another thread fills the first rows, which torch counts."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self and not self.table.is_meta:
            thread = threading.Thread(target=lambda: self.table[:2].copy_(torch.arange(6).view(2, 3)))
            thread.start()
            thread.join()


@idiom()
class CopiedFromWhatNobodyWrote(Numbers):
    """What `__init__` computes is copied to where it is needed."""

    def add(self, config: Any) -> None:
        super().add(config)
        self.register_buffer("moved", torch.arange(300).view(100, 3), persistent=False)

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self:
            self.moved = self.table.clone()


@idiom()
class FilledInTwoSteps(FilledInPart):
    """Sines at even places, cosines at odd ones: in full, in two strided steps."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self:
            right = torch.arange(12.0).view(4, 3)
            self.table[0::2].copy_(right[0::2])
            self.table.data[1::2] = right[1::2]


@idiom()
class FilledThroughATransposedView(FilledInPart):
    """Every place is written, through a view that is not contiguous."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self:
            self.table.t().copy_(torch.arange(12.0).view(4, 3).t())


@idiom()
class BufferAssigned(FilledInPart):
    """The initialiser computes the table and puts it in the buffer's place."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self:
            self.table = torch.arange(12.0).view(4, 3)


@idiom()
class BufferDataSwapped(FilledInPart):
    """The same through `.data`."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self:
            self.table.data = torch.arange(12.0).view(4, 3)


@idiom()
class BufferFromNumpy(FilledInPart):
    """T5X and JAX ports: the table is made by numpy and copied in."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self:
            self.table.data.copy_(torch.from_numpy(torch.arange(12.0).view(4, 3).numpy()))


@idiom()
class BufferThroughNumpy(FilledInPart):
    """The same without an operation of torch."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self and not self.table.is_meta:
            self.table.data.numpy()[:] = torch.arange(12.0).view(4, 3).numpy()


@idiom()
class BufferRegisteredAgain(FilledInPart):
    """Llama of version 4: the cache is registered again whenever it is computed."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self:
            self.register_buffer("table", torch.arange(12.0).view(4, 3), persistent=False)


@idiom()
class OneTableTwoNames(Tiny):
    """Layers that share the rotary table of the first: transformers makes one of the two anew."""

    def add(self, config: Any) -> None:
        self.first, self.second = Rotary(config.hidden_size), Rotary(config.hidden_size)
        self.second.inv_freq = self.first.inv_freq

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Rotary):
            init.copy_(module.inv_freq, rotary(self.config.hidden_size))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x)


@idiom()
class NothingToFill(Tiny):
    """Caches that start empty, or not at all."""

    def add(self, config: Any) -> None:
        self.register_buffer("cache", torch.empty(0), persistent=False)
        self.register_buffer("later", None, persistent=False)
        self.register_buffer("prefix", torch.zeros(0, config.hidden_size), persistent=False)


@idiom(missing=("gate",))
class AParameterNobodyKnows(Tiny):
    """A bare parameter that is set in `__init__` and that no initialiser knows."""

    def add(self, config: Any) -> None:
        self.gate = nn.Parameter(torch.ones(config.hidden_size))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate


@idiom(missing=("gate",))
class AParameterInitialisedInPart(AParameterNobodyKnows):
    """Of a fused parameter one half is initialised."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.ones_(self.gate[:4])

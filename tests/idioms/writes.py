"""Other ways to write: `torch.nn.init`, helpers, lists, statistics, and without torch."""

import ctypes
import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from tests.idioms.tiny import Part, Tiny, idiom


@idiom()
class TorchInit(Tiny):
    """`torch.nn.init` on the parameter: transformers guards it, and nothing is lost."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (Part, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)


@idiom()
class TorchInitOnData(Tiny):
    """`torch.nn.init` on `.data`: the guard looks for a flag that only the parameter has."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            nn.init.xavier_uniform_(module.weight.data)


@idiom()
class TorchInitOnSlices(Tiny):
    """Fused projections, initialised part by part."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            nn.init.orthogonal_(module.weight[:4])
            nn.init.zeros_(module.weight[4:])


def trunc_normal(tensor: torch.Tensor, std: float = 0.02) -> torch.Tensor:
    with torch.no_grad():
        tensor.uniform_(-0.9, 0.9).erfinv_().mul_(std * math.sqrt(2.0))
    return tensor


@idiom()
class TruncatedByHand(Tiny):
    """timm's `trunc_normal_`, copied into the file: a helper writes."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            trunc_normal(module.weight)


@idiom()
class WritesOut(Tiny):
    """`out=` has no underscore."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            torch.eye(module.weight.shape[0], out=module.weight.data)


@idiom()
@idiom("WritesMany, one of them missing", missing=("lin.weight",))
class WritesMany(Tiny):
    """One operation over a list of parameters."""

    def add(self, config: Any) -> None:
        self.register_buffer("cache", torch.empty(0), persistent=False)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            torch._foreach_mul_([self.lin.weight.data, self.part.weight.data], 0.5)


# Operators of somebody else, whose schemas declare no write. One of them writes.
OPERATORS = torch.library.Library("tests_of_writes", "DEF")  # they are gone when this is
for _name, _kernel in {"turn": torch.Tensor.neg_, "look": torch.Tensor.sum}.items():
    OPERATORS.define(f"{_name}(Tensor x) -> Tensor")
    OPERATORS.impl(_name, _kernel, "CPU")


@idiom()
class WritesInAnOperatorThatDeclaresNone(Tiny):
    """A kernel whose schema is wrong."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part) and not module.weight.is_meta:
            torch.ops.tests_of_writes.turn(module.weight)


@idiom()
class LooksInAnOperator(Tiny):
    """A kernel that computes from a weight and leaves it alone."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part) and not module.weight.is_meta:
            torch.ops.tests_of_writes.look(module.weight)


@idiom()
class WritesItsDiagonal(Tiny):
    """Decay matrices and recurrent weights: a strided part of a transposed view."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            module.weight.data.t().diagonal().fill_(1.0)


@idiom(filled={"part.weight": 1.0})
class TheSameValuesAgain(Tiny):
    """A norm whose ones are ones again: written, and nothing lost."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            module.weight.data.fill_(1.0)


@idiom()
class WritesAndRestores(Tiny):
    """A probe of the layer that leaves it as it was."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            kept = module.weight.detach().clone()
            module.weight.data.zero_()
            module.weight.data.copy_(kept)


@idiom()
class ResetsRunningStatistics(Tiny):
    """Vision and audio towers: `reset_running_stats` writes over stored buffers."""

    def add(self, config: Any) -> None:
        self.norm = nn.BatchNorm1d(config.hidden_size)
        self.norm.register_buffer("seen", torch.zeros(1), persistent=False)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.BatchNorm1d):
            init.zeros_(module.seen)
            module.reset_parameters()

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


@idiom()
class CountsAPassInTraining(ResetsRunningStatistics):
    """A pass to see that all fits, before `eval`: a batch norm writes to its statistics, which no schema declares."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if isinstance(module, nn.BatchNorm1d):
            init.zeros_(module.seen)
            if not module.weight.is_meta:
                module(torch.arange(32.0).view(4, 8))


@idiom()
class InitialiserNamedInit(Tiny):
    """An initialiser whose name ends as those of peft's adapters do."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            self.kaiming_init(module)

    def kaiming_init(self, module: Part) -> None:
        nn.init.kaiming_normal_(module.weight.data)


@idiom(missing=("gate",))
class DerivesFromWhatIsStored(Tiny):
    """Adapters that start from the weight they adapt: a missing parameter computed from a stored one."""

    def add(self, config: Any) -> None:
        self.gate = nn.Parameter(torch.zeros(config.hidden_size))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            self.gate.data.copy_(self.lin.weight.data.mean(dim=0))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate


@idiom()
class WritesThroughNumpy(Tiny):
    """JAX ports: no operation of torch writes, but one reaches for the memory."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part) and not module.weight.is_meta:
            module.weight.data.numpy()[:] = 0.0


@idiom(blind=True)
class WritesToAnAddress(Tiny):
    """Foreign kernels: nothing of torch is called at all, and no watch sees it."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part) and not module.weight.is_meta:
            ctypes.memset(module.weight.data_ptr(), 0, module.weight.nbytes)

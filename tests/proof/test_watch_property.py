"""Random modules, stored sets and initialisers that write in every manner: judged against the bytes of the file."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

import tiedquiet
from tests.checkpoints import printing
from tests.idioms import IdiomConfig, assert_agrees, dirty_memory, everything, same, truth
from tiedquiet import LoadError

PARTS = "abc"
TYPES = {"float": torch.float32, "half": torch.float16, "long": torch.int64}

# How a tensor is reached, and which part of it is written.
REACHES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "itself": lambda t: t,
    "data": lambda t: t.data,
    "detach": lambda t: t.detach(),
    "view": lambda t: t.data.view_as(t),
    "flat": lambda t: t.data.view(-1).view(t.shape),
}
REGIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda t: t,
    "row": lambda t: t[1],
    "element": lambda t: t[2, 3],
    "every other row": lambda t: t[::2],
    "every other column": lambda t: t[:, 1::2],
    "column": lambda t: t.t()[2],
    "transposed": lambda t: t.t(),
    "diagonal": lambda t: t.diagonal(),
    "first rows": lambda t: t[:2],
    "last rows": lambda t: t[2:],
    "nothing": lambda t: t[3:3],
    "strided by hand": lambda t: t.as_strided((3,), (5,), t.storage_offset() + 1),
}


def _drawn(like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape).to(like.dtype) if like.is_floating_point() else torch.randint(50, 99, like.shape)


def _set_by_index(region: torch.Tensor) -> None:
    region[...] = _drawn(region)


def _mask(region: torch.Tensor) -> None:
    region.masked_fill_(torch.ones(region.shape, dtype=torch.bool), 5)


# These give every element of the region a value of its own or one for all.
SETS: dict[str, Callable[[torch.Tensor], Any]] = {
    "copy_": lambda r: r.copy_(_drawn(r)),
    "copy_ of another type": lambda r: r.copy_(_drawn(r).double()),
    "fill_": lambda r: r.fill_(3),
    "zero_": lambda r: r.zero_(),
    "by index": _set_by_index,
    "masked_fill_": _mask,
    "torch.nn.init": lambda r: nn.init.constant_(r, 4),
    "foreach copy": lambda r: torch._foreach_copy_([r], [_drawn(r)]),
}
FLOATING: dict[str, Callable[[torch.Tensor], Any]] = {
    "normal_": lambda r: r.normal_(),
    "uniform_": lambda r: r.uniform_(1, 2),
    "torch.nn.init on a slice": lambda r: nn.init.normal_(r),
    "out=": lambda r: torch.add(_drawn(r), 1, out=r) if r.is_contiguous() else r.normal_(),
}


def _restore(region: torch.Tensor) -> None:
    kept = region.clone()
    region.zero_()
    region.copy_(kept)


def _through_numpy(region: torch.Tensor) -> None:
    if not region.is_meta:
        np.copyto(region.detach().numpy(), 7)


# These need something to be there.
CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "mul_": lambda r: r.mul_(2),
    "add_": lambda r: r.add_(1),
    "neg_": lambda r: r.neg_(),
    "foreach": lambda r: torch._foreach_add_([r], 1),
    "clamp_": lambda r: r.clamp_(max=0),
    "sort, out=": lambda r: r.copy_(r.sort(dim=-1).values) if r.dim() else r.add_(1),
    "the same again": lambda r: r.copy_(r.clone()),
    "times one": lambda r: r.mul_(1),
    "restored": _restore,
    "numpy": _through_numpy,
    "as integers": lambda r: (
        r.view(torch.int16 if r.dtype == torch.float16 else torch.int32).bitwise_xor_(64)
        if r.dtype != torch.int64
        else r.add_(1)
    ),
}
SWAPS = ("data", "data with the same values", "itself", "itself with the same values")


@dataclass(frozen=True)
class Write:
    """One thing that the initialiser does to one tensor."""

    key: str
    reach: str
    region: str
    how: str
    is_grad_on: bool

    def run(self, model: nn.Module) -> None:
        prefix, _, name = self.key.rpartition(".")
        owner = model.get_submodule(prefix)
        tensor = getattr(owner, name)
        if self.how in SWAPS:
            # Nothing here reaches for the tensor's memory but the swap itself.
            new = torch.empty_like(tensor).copy_(tensor) if "same" in self.how else _drawn(tensor)
            if self.how.startswith("data"):
                tensor.data = new
            else:
                setattr(owner, name, nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new)
            return
        with torch.set_grad_enabled(self.is_grad_on and self.reach != "itself"):
            {**SETS, **FLOATING, **CHANGES}[self.how](REGIONS[self.region](REACHES[self.reach](tensor)))


@dataclass(frozen=True)
class Tie:
    target: str
    source: str
    how: str

    def run(self, model: nn.Module) -> None:
        source = model.get_parameter(self.source)
        prefix, _, name = self.target.rpartition(".")
        new = {
            "object": lambda: source,
            "memory": lambda: nn.Parameter(source.data),
            "slice": lambda: nn.Parameter(source.data[:4]),
            "clone": lambda: nn.Parameter(source.detach().clone()),
        }[self.how]()
        setattr(model.get_submodule(prefix), name, new)


@dataclass(frozen=True)
class World:
    """A model, what its file stores, and what is done to it after it was read."""

    buffers: dict[str, tuple[str, bool]]
    stored: frozenset[str]
    writes: tuple[Write, ...]
    ties: tuple[Tie, ...]


class Random(PreTrainedModel):
    """Looks at what the world is when it is built; every part owns a buffer, so that none is passed over."""

    config_class = IdiomConfig
    base_model_prefix = "model"
    _tied_weights_keys = None
    world: ClassVar[World]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.anchor = nn.Parameter(torch.zeros(2))
        for part in PARTS:
            module = nn.Module()
            module.weight = nn.Parameter(torch.zeros(5, 4))
            module.register_buffer("present", torch.empty(0), persistent=False)
            self.add_module(part, module)
        for key, (kind, persistent) in self.world.buffers.items():
            part, _, name = key.rpartition(".")
            table = torch.arange(20).view(5, 4).to(TYPES[kind])
            self.get_submodule(part).register_buffer(name, table, persistent=persistent)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for part in PARTS:
            if module is self.get_submodule(part):
                for write in self.world.writes:
                    if write.key.startswith(f"{part}."):
                        write.run(self)

    def tie_weights(self, *_: Any, **__: Any) -> None:
        if not self.anchor.is_meta:  # `__init__` ties, too
            for tie in self.world.ties:
                tie.run(self)


@st.composite
def worlds(draw: Any) -> World:
    weights = [f"{part}.weight" for part in PARTS]
    names = st.sampled_from([f"{part}.{name}" for part in PARTS for name in ("table", "scale")])
    buffers = draw(st.dictionaries(names, st.tuples(st.sampled_from(sorted(TYPES)), st.booleans()), max_size=4))
    persistent = [key for key, (_, is_persistent) in buffers.items() if is_persistent]
    keys = ["anchor", *weights, *persistent]
    stored = set(keys) - draw(st.sets(st.sampled_from(keys[1:])))
    writes = []
    for key in draw(st.lists(st.sampled_from([*weights, *buffers]), max_size=6)):
        kinds: list[Any] = [SETS]
        if buffers.get(key, ("float",))[0] != "long":
            kinds.append(FLOATING)
        if key in stored:
            kinds += [CHANGES, SWAPS]
        elif key in buffers:
            kinds.append(SWAPS[::2])
        how = draw(st.sampled_from([*draw(st.sampled_from(kinds))]))
        reach, region = draw(st.sampled_from(sorted(REACHES))), draw(st.sampled_from(sorted(REGIONS)))
        writes.append(Write(key, reach, region, how, draw(st.booleans())))
    pairs = st.tuples(st.sampled_from(weights), st.sampled_from(weights)).filter(lambda pair: pair[0] != pair[1])
    ties: list[Tie] = []
    for target, source in draw(st.lists(pairs, max_size=2, unique_by=lambda pair: pair[0])):
        # A copy of what was written in part has been written to, and is garbage all the same: nothing is claimed.
        is_whole = source in stored and source not in {tie.target for tie in ties}
        hows = ["object", "memory", "slice", *(["clone"] if is_whole else [])]
        ties.append(Tie(target, source, draw(st.sampled_from(hows))))
    return World(buffers, frozenset(stored), tuple(writes), tuple(ties))


def save(world: World, folder: Path) -> dict[str, torch.Tensor]:
    Random.world = World(world.buffers, world.stored, (), ())
    torch.manual_seed(3)
    model = Random(IdiomConfig())
    model.save_pretrained(folder, state_dict={key: _drawn(model.state_dict()[key]) for key in sorted(world.stored)})
    Random.world = world
    return load_file(folder / "model.safetensors")


def load(folder: Path) -> Random:
    torch.manual_seed(5)
    return Random.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(worlds())
def test_what_is_said_agrees_with_the_bytes(world: World) -> None:
    Random.world = world
    with tempfile.TemporaryDirectory() as folder, dirty_memory(), printing() as printed:
        file = save(world, Path(folder))
        with tiedquiet.enable("off"):
            plain = load(Path(folder))
        found = truth(plain, file, Random(IdiomConfig()))
        with tiedquiet.enable("on"):
            model = load(Path(folder))
        theirs = everything(plain)
        for key, value in everything(model).items():
            assert same(value.detach(), theirs[key].detach()), "the watch changes nothing"
        proof = tiedquiet.check(model)
        assert_agrees(proof, model, truth(model, file, Random(IdiomConfig())), file)
        broken = found.broken(file)
        with tiedquiet.enable("strict"):
            try:
                load(Path(folder))
                assert not broken
            except LoadError:
                assert broken is not False
        with tiedquiet.enable("repair"):
            mended = load(Path(folder))
        now, after = everything(mended), truth(mended, file, Random(IdiomConfig()))
        for key, value in file.items():
            assert key in after.rivals or same(now[key].detach(), value), "what was stored is there"
        assert_agrees(tiedquiet.check(mended), mended, after, file)
        assert not any("failed" in line for line in printed.of("tiedquiet"))

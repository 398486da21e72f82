"""What has the values of a tensor on meta, hook by hook; the hooks are accelerate's own."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import nn

from tiedquiet.proof.aside import is_moved, is_served, with_aside


def model() -> Any:
    made: Any = nn.Sequential(nn.Sequential(nn.Linear(2, 3)))
    made.own = nn.Parameter(torch.ones(2))
    made.register_module("none", None)
    return made


def tensors(of: nn.Module) -> dict[str, torch.Tensor]:
    return of.state_dict(keep_vars=True)


def test_without_a_hook_nothing_is_kept_elsewhere() -> None:
    plain = model()
    assert not any(is_moved(plain, name) or is_served(plain, name) for name in ("0.0.weight", "gone.weight", "none.x"))
    assert with_aside(plain, state := tensors(plain)) is state


def test_what_is_kept_in_memory_is_found_there() -> None:
    for options in ({}, {"state_dict": {name: torch.full_like(t, 2) for name, t in model().state_dict().items()}}):
        offloaded = model()
        before = {name: tensor.detach().clone() for name, tensor in offloaded.state_dict().items()}
        accelerate.cpu_offload(offloaded, execution_device="cpu", **options)
        kept = with_aside(offloaded, tensors(offloaded))
        assert all(tensor.is_meta for tensor in tensors(offloaded).values())
        for name, value in (options.get("state_dict") or before).items():
            assert is_served(offloaded, name)
            assert torch.equal(kept[name], value)


def test_one_hook_may_serve_all_modules_inside() -> None:
    offloaded = model()
    state = {name: tensor.detach().clone() for name, tensor in offloaded.state_dict().items()}
    accelerate.cpu_offload(offloaded, execution_device="cpu", preload_module_classes=["Sequential"])
    assert not hasattr(offloaded[0][0], "_hf_hook")
    kept = with_aside(offloaded, tensors(offloaded))
    assert all(torch.equal(kept[name], value) for name, value in state.items())
    assert is_served(offloaded, "0.0.weight")
    assert not is_served(offloaded, "0.0.gone")


def test_what_is_on_disk_is_served_and_not_read(tmp_path: Path) -> None:
    offloaded = model()
    accelerate.disk_offload(offloaded, str(tmp_path), execution_device="cpu")
    (tmp_path / "0.0.weight.dat").unlink()
    assert is_served(offloaded, "0.0.weight")
    assert not is_served(offloaded, "0.0.gone")
    assert with_aside(offloaded, state := tensors(offloaded)) is state


def test_a_hook_that_moves_only_inputs_serves_nothing() -> None:
    hooked = model()
    accelerate.hooks.add_hook_to_module(hooked, accelerate.hooks.AlignDevicesHook(io_same_device=True))
    assert is_moved(hooked, "0.0.weight")
    assert not is_served(hooked, "0.0.weight")
    serves = accelerate.hooks.AlignDevicesHook(offload=True, weights_map={"weight": torch.zeros(3, 2)})
    both = accelerate.hooks.SequentialHook(accelerate.hooks.AlignDevicesHook(), serves)
    accelerate.hooks.add_hook_to_module(hooked[0][0], both)
    assert is_served(hooked, "0.0.weight")
    assert not is_served(hooked, "0.0.bias")


def test_of_what_is_not_known_nothing_is_claimed() -> None:
    class OfSomebody(accelerate.hooks.ModelHook):
        pass

    class Shards(nn.Linear):
        def set_reshard_after_forward(self) -> None: ...

    hooked = model()
    accelerate.hooks.add_hook_to_module(hooked[0], OfSomebody())
    assert is_served(hooked, "0.0.weight")
    assert with_aside(hooked, state := tensors(hooked)) is state
    assert is_served(nn.Sequential(Shards(1, 1)), "0.weight")
    hooked = nn.Sequential(Shards(1, 1, device="meta"))
    assert with_aside(hooked, state := tensors(hooked)) is state
    reads = nn.Sequential(nn.Linear(1, 1, device="meta"))
    hook = accelerate.hooks.AlignDevicesHook(offload=True)
    reads[0]._hf_hook, hook.weights_map = hook, Reads()  # type: ignore[assignment]
    assert is_served(reads, "0.weight")
    assert with_aside(reads, state := tensors(reads)) is state


class Reads(Mapping[str, torch.Tensor]):
    """A map of somebody's own, of which nobody can tell what it has without reading it."""

    def __getitem__(self, name: str) -> torch.Tensor:
        raise AssertionError("it is not read")

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("it is not read")

    def __len__(self) -> int:
        return 1

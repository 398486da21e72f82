"""What `--lora` is made of: reading the file, multiples of its tensors, and which of them another is made of."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tiedquiet.gate import lora
from tiedquiet.gate.trace import Trace


def test_code_that_was_allowed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(1)}, path, {"lora_adapter_metadata": '{"megatron_config": null}'})
    assert lora.read(str(path), trust=True).metadata == {"megatron_config": None}


@pytest.mark.parametrize(
    ("made", "factor"),
    [
        (lambda t: t, 1.0),
        (lambda t: t.reshape(6, 2, 1), 1.0),
        (lambda t: t[2:4], 1.0),
        (lambda t: t[4:] * 0.375, 0.375),
        (lambda t: t[1:3], 0),
        (lambda t: t[1:], 1.0),
        (lambda t: t + 1, 0),
        (lambda t: t * 0, 0),
        (lambda t: torch.full_like(t, torch.inf), 0),
    ],
)
def test_multiples_and_parts(made: Any, factor: float) -> None:
    stored = torch.randn(6, 2)
    assert lora.factor_of(made(stored), stored) == pytest.approx(factor)


def test_multiples_of_a_single_number_of_zeros_and_of_whole_numbers() -> None:
    assert lora.factor_of(torch.ones(2), torch.tensor(1.0)) == 0
    assert lora.factor_of(torch.tensor(2.0), torch.tensor(1.0)) == 2.0
    assert lora.factor_of(torch.ones(3), torch.zeros(3)) == 0
    assert lora.factor_of(torch.zeros(3), torch.zeros(3)) == 1.0
    assert lora.factor_of(torch.ones(0, 3), torch.ones(2, 3)) == 0
    assert lora.factor_of(torch.tensor([2.0, 4.0]), torch.tensor([1, 2])) == 2.0


def test_what_is_made_of_what() -> None:
    one, other = torch.ones(2, 2), torch.ones(2, 2)
    with Trace({"one": one, "other": other}) as trace:
        both = torch.cat([one, other * 2])
        assert trace.of(both.chunk(2)[0].T) == {"one", "other"}
        assert trace.of(torch.split(one, 1)[1]) == {"one"}
        assert trace.of(torch.zeros_like(one)) == trace.of(one.new_empty(3)) == trace.of(torch.ones(2)) == frozenset()
        copied = torch.empty(2, 2)
        with contextlib.suppress(RuntimeError):
            torch.ops.aten.copy_(src=other, self=copied)
        assert trace.of(copied) == {"other"}
        other[0, 0].item()
    assert trace.asked == {"other"}

"""Names without end in a stranger's file: the rules that guess what they may be pass over them, in `check` and in a load."""

import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.gate.test_check import check
from tiedquiet.gate.single import _ends
from tiedquiet.proof.codes import Scales
from tiedquiet.proof.prefixes import candidates, common_prefixes

LOST = "transformer.h.0.attn.c_attn.weight"
LONG = 4_000 * "a."


@pytest.mark.parametrize("name", [LONG, 450 * "a."], ids=["thousands", "at the limit"])
def test_names_of_very_many_parts(name: str, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = good / "model.safetensors"
    tensors = load_file(path)
    values = tensors.pop(LOST)
    save_file({**tensors, **{f"{name}{i}.weight": values.clone() for i in range(20)}}, path, {"format": "pt"})
    began = time.process_time()
    assert check(good) == 1
    assert time.process_time() - began < 20  # it took minutes
    assert "1 tied; 1 missing" in capsys.readouterr().out


@pytest.mark.parametrize("sign", "._")
def test_what_such_a_name_takes_of_memory(sign: str) -> None:
    name = sign.join(["a"] * 20_000)
    tracemalloc.start()
    try:
        Scales([name])
        common_prefixes([name])
        candidates({f"{name}.weight": torch.ones(1)}, {LOST: torch.ones(1)}, [LOST])
        assert len(list(_ends(name))) <= 16
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()

"""Models with parts that torch.jit has compiled, before they were loaded or since."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiedquiet
from tests.doors.renamed import verdicts
from tests.idioms import Idiom, Tiny
from tiedquiet import Verdict

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")  # it is deprecated, and in use


class Inner(nn.Module):
    """With a tensor of its own, and one in a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) * self.scale


def compiled(way: str) -> Any:
    if way == "script":
        return torch.jit.script(nn.Sequential(Inner()))

    class Compiled(torch.jit.ScriptModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        @torch.jit.script_method
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    return Compiled()


class WithCompiled(Tiny):
    way = ""

    def add(self, config: Any) -> None:
        self.compiled = compiled(self.way)


@pytest.mark.parametrize("way", ["script", "class"])
def test_a_part_that_is_compiled_is_proven(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WithCompiled, "way", way)
    inner = "compiled.0" if way == "script" else "compiled.inner"
    file = Idiom(WithCompiled, missing=(f"{inner}.lin.bias",)).save(tmp_path)
    model = WithCompiled.from_pretrained(tmp_path)
    assert verdicts(model) == {f"{inner}.lin.bias": Verdict.UNWRITTEN}, "_init_weights knows no such layer"
    proof = tiedquiet.check(model)
    assert (proof.stored, proof.total) == (len(file), len(file) + 1)
    model.compiled = nn.Sequential(Inner())
    assert {finding.key for finding in tiedquiet.check(model).findings if finding.since} >= {f"{inner}.scale"}


def test_a_part_that_was_compiled_since_is_followed(tmp_path: Path) -> None:
    Idiom(Tiny).save(tmp_path)
    model: Any = Tiny.from_pretrained(tmp_path)
    before = tiedquiet.check(model)
    model.part = torch.jit.script(model.part)
    assert tiedquiet.check(model) == before
    model.more = compiled("class")
    assert {finding.verdict for finding in tiedquiet.check(model).findings} == {Verdict.MISSING}

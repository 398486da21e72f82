"""A config by which memory without end is taken, in what no module registers: `check` says so in one line."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from tests.gate.test_check import check, config_of
from tests.gate.test_strangers import refused
from tiedquiet.gate import bounds
from tiedquiet.gate.bounds import bounded, roomy

__all__ = ["refused"]

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux alone counts it")
SAYS = "it takes more memory than there is, or than "


@pytest.fixture
def of_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes as may be taken in a test."""
    monkeypatch.setattr(bounds, "_MOST_NUMBERS", 10**8)


@pytest.mark.usefixtures("of_little")
def test_tables_of_positions_without_end(tmp_path: Path, refused: Callable[[Path], str]) -> None:
    """They are computed before they are registered: the process was killed."""
    diffusers = pytest.importorskip("diffusers")
    size = {"num_attention_heads": 1, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 1}
    model = diffusers.WanTransformer3DModel(**size, text_dim=8, freq_dim=8, ffn_dim=8, rope_max_seq_len=32)
    model.save_pretrained(tmp_path / "transformer")
    assert check(tmp_path / "transformer") == 0
    config_of(tmp_path / "transformer", rope_max_seq_len=10**9)
    assert SAYS in refused(tmp_path / "transformer")


@pytest.mark.parametrize(
    "take",
    [
        lambda: torch.arange(10**9),
        lambda: torch.ones(40_000, 1) @ torch.ones(1, 40_000),
        lambda: numpy.ones(10**9),
        lambda: [0] * 10**9,
        lambda: [bytes(1000) for _ in range(10**7)],
    ],
    ids=["torch", "outer", "numpy", "list", "loop"],
)
@pytest.mark.usefixtures("of_little")
def test_what_takes_memory_is_stopped(take: Callable[[], object]) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(RuntimeError, match=SAYS), bounded(1):
        take()
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    with pytest.raises(ValueError, match="another"), bounded(1):
        raise ValueError("another")
    with pytest.raises(RuntimeError, match="another"), bounded(1):
        raise RuntimeError("another")


def test_a_limit_of_the_user_s_stays() -> None:
    before, hardest = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 40, hardest))
    try:
        with roomy(1 << 50):
            assert resource.getrlimit(resource.RLIMIT_DATA)[0] == 1 << 40
        with roomy(1):
            assert resource.getrlimit(resource.RLIMIT_DATA)[0] < 1 << 40
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == 1 << 40
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hardest))


@pytest.mark.usefixtures("of_little")
def test_nothing_is_limited_where_it_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with roomy(0):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
    monkeypatch.setitem(sys.modules, "resource", None)
    with roomy(1):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
        nn.Linear(2, 2)

"""A config by which memory without end is taken, in what no module registers: `check` says so in one line."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.gate.test_check import check, config_of
from tiedquiet.gate import bounds, lora
from tiedquiet.gate.bounds import bounded, roomy
from tiedquiet.gate.load import How
from tiedquiet.gate.source import Source

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux alone counts it")
SAYS = " bytes of memory, the limit for files of this size, or more than there is"


@pytest.fixture
def of_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes as may be taken in a test."""
    monkeypatch.setattr(bounds, "_MOST_NUMBERS", 10**8)


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    diffusers = pytest.importorskip("diffusers")
    size = {"num_attention_heads": 1, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 1}
    model = diffusers.WanTransformer3DModel(**size, text_dim=8, freq_dim=8, ffn_dim=8, rope_max_seq_len=32)
    model.save_pretrained(tmp_path / "transformer")
    assert check(tmp_path / "transformer") == 0
    return tmp_path / "transformer"


@pytest.mark.usefixtures("of_little")
def test_tables_of_positions_without_end(wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are computed before they are registered: the process was killed."""
    config_of(wan, rope_max_seq_len=10**9)
    path = (wan / "diffusion_pytorch_model.safetensors").rename(tmp_path / "one.safetensors")
    for given in ((path, "--config", str(wan)), (wan,)):
        capsys.readouterr()
        assert check(*given) == 2
        error = capsys.readouterr().err
        assert SAYS in error
        assert error.count("\n") == 1
        shutil.copy(path, wan / "diffusion_pytorch_model.safetensors")


@pytest.mark.usefixtures("of_little")
def test_ranks_without_end(wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a LoRA file, whose metadata says them; its layers are made before its tensors are looked at."""
    about = {"r": 10**9, "lora_alpha": 2, "target_modules": ["to_q"], "rank_pattern": {}, "alpha_pattern": {}}
    name = "transformer.blocks.0.attn1.to_q.lora_{}.weight"
    tensors = {name.format("A"): torch.ones(2, 12), name.format("B"): torch.ones(12, 2)}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in about.items()})}
    save_file(tensors, tmp_path / "lora.safetensors", metadata)
    assert check(wan, "--lora", str(tmp_path / "lora.safetensors")) == 1
    assert SAYS in capsys.readouterr().out
    config_of(wan, rope_max_seq_len=10**9)
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    result = lora.check_pipeline(Source(str(tmp_path), None), lora.File(Path("x"), tensors, None), How())
    assert SAYS in result.error


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


@pytest.mark.usefixtures("of_little")
def test_a_class_of_another_type_takes_no_memory_without_end(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is made to see whether an `Auto` class makes it of this config, and lists as many layers as that says."""
    pytest.importorskip("transformers.models.hrm_text")
    config_of(good, architectures=["GPT2Model"], model_type="hrm_text", H_cycles=3 * 10**8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert check(good) == 0
    assert "of which AutoModel makes HrmTextModel\n" in capsys.readouterr().out
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10**6

"""A resume into other types than the files have: what the cast loses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.training import SMALL, llama, trainer_of
from tiedquiet import LoadError, Verdict

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
UP = "model.layers.0.mlp.up_proj.weight"


class Counts(LlamaForCausalLM):
    """Has whole numbers in its state dict."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("steps", torch.zeros(4, dtype=torch.int64))


def counts() -> Any:
    return Counts(LlamaConfig(**SMALL, tie_word_embeddings=True))


def checkpoint_of(build: Callable[[], Any], folder: Path, **changed: torch.Tensor) -> Path:
    build().save_pretrained(folder)
    tensors = {**load_file(folder / "model.safetensors"), **{k.replace("__", "."): v for k, v in changed.items()}}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def resumed(model: Any, folder: Path, wrap: Callable[[Any], Any] = lambda model: model) -> Any:
    trainer_of(wrap(model), folder)._load_from_checkpoint(str(folder))
    return model


def wrong(model: Any) -> dict[str, Verdict]:
    return {f.key: f.verdict for f in tiedquiet.check(model).findings if f.verdict is not Verdict.TIED}


@pytest.mark.parametrize(
    ("wrap", "prefix", "verdict"),
    [(torch.compile, "_orig_mod.", Verdict.UNPROVEN), (lambda model: model, "", Verdict.OVERWRITTEN)],
    ids=["compiled", "plain"],
)
def test_numbers_that_are_too_large_for_the_model_s_type(
    wrap: Any, prefix: str, verdict: Verdict, tmp_path: Path
) -> None:
    large = {UP.replace(".", "__"): torch.full((32, 32), 1e10)}
    folder = checkpoint_of(llama, tmp_path, **large)
    tensors = load_file(folder / "model.safetensors")
    save_file({prefix + k: value for k, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    model = resumed(llama().half(), folder, wrap)
    assert not model.get_parameter(UP).isfinite().any()
    assert wrong(model) == {UP: verdict}, "under names of its own, the files are not asked again"
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="by the cast to float16"):
        resumed(llama().half(), folder, wrap)


def test_numbers_that_repair_read_are_too_large(tmp_path: Path) -> None:
    folder = checkpoint_of(llama, tmp_path, **{UP.replace(".", "__"): torch.full((32, 32), 1e10)})
    with tiedquiet.enable("repair"):
        model = resumed(llama().half(), folder, torch.compile)
    assert wrong(model) == {UP: Verdict.UNREAD}, "it does not hold what repair copied"


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_that_fit_are_no_finding(kind: torch.dtype, tmp_path: Path, printed: Printed) -> None:
    with tiedquiet.enable("strict"):
        model = resumed(llama().to(kind), checkpoint_of(llama, tmp_path))
    assert wrong(model) == {}
    assert not printed.loud


def test_codes_without_their_scale(tmp_path: Path, printed: Printed) -> None:
    codes = {UP: torch.ones(32, 32).to(torch.float8_e4m3fn), f"{UP}_scale": torch.ones(1)}
    folder = checkpoint_of(llama, tmp_path, **{key.replace(".", "__"): value for key, value in codes.items()})
    printed.records.clear()
    assert wrong(resumed(llama(), folder)) == {UP: Verdict.UNREAD}
    assert f"float8_e4m3fn codes were read as values, without {UP}_scale" in printed.loud[-1]
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="codes were read as values"):
        resumed(llama(), folder)


def test_fractions_in_a_buffer_of_whole_numbers(tmp_path: Path) -> None:
    folder = checkpoint_of(counts, tmp_path, steps=torch.tensor([0.5, 1.5, 2.5, 3.5]))
    assert wrong(resumed(counts(), folder)) == {"steps": Verdict.OVERWRITTEN}
    with (
        tiedquiet.enable("strict"),
        pytest.raises(LoadError, match=r"cast to int64: .* Give it the type torch"),
    ):
        resumed(counts(), folder)


def test_whole_numbers_in_it_are_no_finding(tmp_path: Path) -> None:
    assert wrong(resumed(counts(), checkpoint_of(counts, tmp_path / "as float", steps=torch.ones(4)))) == {}
    with tiedquiet.enable("strict"):
        assert wrong(resumed(counts(), checkpoint_of(counts, tmp_path / "as it is"))) == {}

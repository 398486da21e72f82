"""A resume into other types than the files have: what the cast loses; and into other shapes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.training import SMALL, llama, llava, mixtral, state, trainer_of
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


class Normalises(LlamaForCausalLM):
    """Has a batch norm, which sets its count of batches by itself where the file has none."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.normalise = torch.nn.BatchNorm1d(4)


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


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_what_a_module_sets_by_itself_has_no_type_in_the_file(
    kind: torch.dtype, tmp_path: Path, printed: Printed
) -> None:
    config = LlamaConfig(**SMALL, tie_word_embeddings=True)
    Normalises(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["normalise.num_batches_tracked"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert wrong(resumed(Normalises(config).to(kind), tmp_path)) == {}
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


def larger_llava() -> Any:
    model = llava()
    model.resize_token_embeddings(70)
    return model


def larger_mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=3))


@pytest.mark.parametrize(
    ("written", "build", "how_many"),
    [(llava, larger_llava, 2), (larger_llava, llava, 2), (mixtral, larger_mixtral, 6), (larger_mixtral, mixtral, 6)],
)
def test_what_is_renamed_and_has_another_shape(
    written: Any, build: Any, how_many: int, tmp_path: Path, printed: Printed
) -> None:
    """Torch stops where the names are the same; these it never compares."""
    model = written()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(1)
    model.save_pretrained(tmp_path)
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="in another shape"):
        resumed(build(), tmp_path)
    model = build()
    before = state(model)
    with tiedquiet.enable("repair"):
        resumed(model, tmp_path)
    lost = {key for key, verdict in wrong(model).items() if verdict is Verdict.UNREAD}
    assert len(lost) == how_many
    assert all(torch.equal(state(model)[key], before[key]) for key in lost)
    (line,) = printed.loud
    assert f"unread, {how_many} of" in line
    assert line.endswith(
        "there, in another shape. Give Trainer a model that from_pretrained loaded from this checkpoint"
    )


def test_rows_that_were_appended_to_what_the_model_was_made_from(tmp_path: Path, printed: Printed) -> None:
    llava().save_pretrained(tmp_path)
    for is_changed in (False, True):
        model = type(llava()).from_pretrained(tmp_path)
        model.resize_token_embeddings(70)
        with torch.no_grad():
            model.get_input_embeddings().weight[0, 0] += is_changed
        resumed(model, tmp_path)
        found = {"model.language_model.embed_tokens.weight": Verdict.UNREAD} if is_changed else {}
        assert wrong(model) == found
        assert bool(printed.loud) == is_changed

"""What the cast to the type of a load makes infinite, and what was so in the file."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, MixtralForCausalLM

import tiedquiet
from tests.checkpoints import Printed, gpt2
from tests.doors.renamed import verdicts, written
from tests.gate.test_check import check
from tests.gate.test_compare import mixtral
from tiedquiet import LoadError, Verdict

NORM, EXPERTS = "transformer.ln_f.weight", "model.layers.0.mlp.experts.gate_up_proj"
INFINITE = float("inf")
# A value of the final norm in the file, the type of the file, and the type that it is loaded as.
TOO_LARGE = {
    "bfloat16 as float16": (1e10, torch.bfloat16, torch.float16),
    "float32 as bfloat16": (torch.finfo(torch.float32).max, torch.float32, torch.bfloat16),
    "lowest of float32 as bfloat16": (torch.finfo(torch.float32).min, torch.float32, torch.bfloat16),
    "float64 as float32": (1e300, torch.float64, torch.float32),
    "int64 as float16": (100_000, torch.int64, torch.float16),
    "int32 as float16": (-100_000, torch.int32, torch.float16),
}
SOUND = {
    "minus infinity": (-INFINITE, torch.float32, torch.float16),
    "infinity": (INFINITE, torch.float32, torch.bfloat16),
    "not a number": (float("nan"), torch.float32, torch.float16),
    "the largest": (65504.0, torch.float32, torch.float16),
    "rounded to the largest": (3.39e38, torch.float32, torch.bfloat16),
    "float32 as bfloat16": (1e10, torch.float32, torch.bfloat16),
    "int16 as float16": (-32768, torch.int16, torch.float16),
}


def gpt2_with(value: float, dtype: torch.dtype, folder: Path, name: str = NORM) -> dict[str, torch.Tensor]:
    written(GPT2LMHeadModel(gpt2()), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].to(dtype)
    tensors[name][3] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def load(folder: Path | None, dtype: torch.dtype, mode: str = "on", **how: Any) -> Any:
    with tiedquiet.enable(mode):
        return GPT2LMHeadModel.from_pretrained(folder, dtype=dtype, **how)


@pytest.mark.parametrize("case", TOO_LARGE)
def test_what_became_infinite_by_a_cast(case: str, tmp_path: Path) -> None:
    value, stored, ours = TOO_LARGE[case]
    gpt2_with(value, stored, tmp_path)
    model = load(tmp_path, ours)
    assert model.transformer.ln_f.weight.isinf().any()
    for _ in ("asked", "asked again"):
        found = {f.key: (f.verdict, f.why) for f in tiedquiet.check(model).findings if f.verdict is not Verdict.TIED}
        kinds = [str(kind).removeprefix("torch.") for kind in (ours, stored)]
        why = "by the cast to {}, which is too small for values that the file has as {}".format(*kinds)
        assert found == {NORM: (Verdict.OVERWRITTEN, why)}
    cure = stored if stored.is_floating_point else torch.float32
    with pytest.raises(LoadError, match=f"{why}. Load it with dtype={cure}$"):
        load(tmp_path, ours, "strict")
    load(tmp_path, cure, "strict")
    if ours is not torch.float32:
        assert check(tmp_path, "--dtype", kinds[0]) == 1


@pytest.mark.parametrize("case", SOUND)
def test_what_is_at_the_limit_of_its_type_in_the_file_is_sound(case: str, tmp_path: Path) -> None:
    value, stored, ours = SOUND[case]
    given = gpt2_with(value, stored, tmp_path)
    for mode in ("on", "strict"):
        assert tiedquiet.check(load(tmp_path, ours, mode)).ok
    model = load(tmp_path, ours)
    assert tiedquiet.check(model).ok
    (tmp_path / "model.safetensors").unlink()
    assert tiedquiet.check(model).ok, "what has been looked at is not asked again"
    in_strict = load(None, ours, "strict", config=gpt2(), state_dict=given)
    assert tiedquiet.check(in_strict).ok, "it was looked at when it was loaded"


@pytest.mark.parametrize("change", ["written anew", "deleted", "no file"])
def test_of_files_that_are_no_longer_those_that_were_read_nothing_is_known(change: str, tmp_path: Path) -> None:
    given = gpt2_with(-INFINITE, torch.float32, tmp_path)
    how = {"config": gpt2(), "state_dict": given} if change == "no file" else {}
    model = load(None if how else tmp_path, torch.float16, **how)
    if change == "written anew":
        save_file({**given, "more": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    else:
        (tmp_path / "model.safetensors").unlink()
    found = {f.key: (f.verdict, f.why) for f in tiedquiet.check(model).findings if f.verdict is not Verdict.TIED}
    assert found == {NORM: (Verdict.UNPROVEN, "it has values at the limit of float16, to which it was cast")}


@pytest.mark.parametrize("value", [1e10, -INFINITE])
def test_what_is_tied_to_values_at_the_limit_is_not_confirmed(value: float, tmp_path: Path, printed: Printed) -> None:
    gpt2_with(value, torch.float32, tmp_path, "transformer.wte.weight")
    model = load(tmp_path, torch.float16)
    why = "lm_head.weight: transformer.wte.weight has values at the limit of its type"
    assert any(why in line for line in printed.of("tiedquiet", logging.DEBUG))
    assert tiedquiet.check(model).ok is (value == -INFINITE), "the file was asked"


@pytest.mark.parametrize("to", [torch.full((16,), INFINITE).half(), torch.empty(16, device="meta"), None])
def test_what_was_replaced_or_removed_is_not_looked_at(to: torch.Tensor | None, tmp_path: Path) -> None:
    gpt2_with(1e10, torch.float32, tmp_path)
    model = load(tmp_path, torch.float16)
    model.transformer.ln_f.weight = None if to is None else torch.nn.Parameter(to)
    assert verdicts(model)[NORM] is Verdict.UNPROVEN


@pytest.mark.parametrize("value", [1e10, -INFINITE, float("nan"), 1.0])
def test_what_is_merged_is_judged_by_each_tensor_of_the_file(value: float, tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.2.w1.weight"][0, 0] = value
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert verdicts(model) == ({EXPERTS: Verdict.OVERWRITTEN} if value == 1e10 else {})
    assert check(tmp_path, "--dtype", "float16") == (value == 1e10)
    with tiedquiet.enable("strict"):
        if value == 1e10:
            with pytest.raises(LoadError, match=f"{EXPERTS} by the cast to float16"):
                MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
        else:
            assert tiedquiet.check(MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)).ok


class _Counts(GPT2LMHeadModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
        self.post_init()


def test_a_whole_number_that_lost_its_sign(tmp_path: Path) -> None:
    written(_Counts(gpt2()), tmp_path, counts=torch.tensor([1, 2**63], dtype=torch.uint64))
    assert verdicts(_Counts.from_pretrained(tmp_path))["counts"] is Verdict.OVERWRITTEN


class Counts(GPT2LMHeadModel):
    """Has whole numbers in its state dict."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("steps", torch.zeros(4, dtype=torch.int64))


def test_what_repair_read_and_the_cast_lost_is_not_said_to_be_read(tmp_path: Path, printed: Printed) -> None:
    written(Counts(gpt2()), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {"steps": torch.full((4,), 0.5)}
    renamed = {f"module.{name}": value for name, value in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    with tiedquiet.enable("repair"):
        model = Counts.from_pretrained(tmp_path)
    assert verdicts(model)["steps"] is Verdict.OVERWRITTEN
    (line,) = printed.confirmed
    assert "read by TIEDQUIET=repair" in line
    assert "steps" not in line


@pytest.mark.parametrize("kind", [torch.int8, torch.int64])
@pytest.mark.parametrize("key", ["transformer.wpe.weight", NORM])
def test_whole_numbers_without_a_scale(key: str, kind: torch.dtype, tmp_path: Path, printed: Printed) -> None:
    """No matrix was trained that has nothing else; a vector may well be stored so."""
    written(GPT2LMHeadModel(gpt2()), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[key] = torch.ones_like(tensors[key], dtype=kind)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32)
    if key == NORM:
        assert (tiedquiet.check(model).ok, printed.loud) == (True, [])
        return
    assert verdicts(model)[key] is Verdict.UNREAD
    assert "codes were read as values, and the checkpoint has no scale beside them" in printed.loud[0]
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="no scale"):
        GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32)

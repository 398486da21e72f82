"""Files with a second copy of a model or of some of its tensors; and what else random changes of files have found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, GPT2LMHeadModel, Trainer, TrainingArguments

import tiedquiet
from tests.checkpoints import gpt2, reading_of
from tests.doors.renamed import BERT, SMALL, verdicts, written, wrong
from tests.doors.test_unread_ends import in_two_shards
from tests.gate.test_compare import mixtral
from tiedquiet import Finding, LoadError, Verdict
from tiedquiet.proof.doubts import doubts_of
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.names import Made, Origin

NORM = "bert.encoder.layer.0.output.LayerNorm"


def bert() -> Any:
    return BertForMaskedLM(BertConfig(**BERT))


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file({name: value.clone() for name, value in change(load_file(path)).items()}, path, {"format": "pt"})


def stopped(kind: Any, folder: Path) -> str:
    with tiedquiet.enable("strict"), pytest.raises(LoadError) as raised:
        kind.from_pretrained(folder)
    return str(raised.value)


def repaired(kind: Any, folder: Path) -> Any:
    with tiedquiet.enable("repair"):
        return kind.from_pretrained(folder)


def averaged(tensors: dict[str, torch.Tensor], by: int = 1) -> dict[str, torch.Tensor]:
    """Weights averaged over time, beside those that are not, of which one layer is gone."""
    left = {name: value for name, value in tensors.items() if ".layer.0." not in name and ".layers.0." not in name}
    return left | {f"ema.{name}": value + by for name, value in tensors.items()}


@pytest.mark.parametrize("build", [bert, mixtral])
def test_another_copy_of_the_model_is_not_read_into_its_gaps(build: Any, tmp_path: Path) -> None:
    kind, truth = type(build()), written(build(), tmp_path)
    rewritten(tmp_path, averaged)
    model = kind.from_pretrained(tmp_path)
    lost = wrong(model, truth)
    assert {key for key, verdict in verdicts(model).items() if verdict is Verdict.UNREAD} == lost
    assert "has other values than" in stopped(kind, tmp_path)
    model = repaired(kind, tmp_path)
    assert wrong(model, truth) == lost
    assert not any(torch.equal(model.state_dict()[key], truth[key] + 1) for key in lost)
    assert not tiedquiet.check(model).ok


def test_a_copy_with_the_same_values_is_read(tmp_path: Path) -> None:
    truth = written(bert(), tmp_path)
    rewritten(tmp_path, lambda tensors: averaged(tensors, by=0))
    assert "TIEDQUIET=repair" in stopped(BertForMaskedLM, tmp_path)
    model = repaired(BertForMaskedLM, tmp_path)
    assert not wrong(model, truth)
    assert tiedquiet.check(model).ok


@pytest.mark.parametrize("by", [0, 1])
def test_of_two_copies_under_another_name_the_one_inside_another_prefix_is_not_read(by: int, tmp_path: Path) -> None:
    truth = written(bert(), tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        of_encoder = {name.replace(".encoder.", ".trunk."): value for name, value in tensors.items() if ".enc" in name}
        left = {name: value for name, value in tensors.items() if ".enc" not in name}
        ema = {f"ema.{name}": value + by for name, value in of_encoder.items()}
        of_encoder.popitem()  # it is not whole: all of the model is in the other one alone
        return left | of_encoder | ema

    rewritten(tmp_path, change)
    assert ("is there as well, and has other values" in stopped(BertForMaskedLM, tmp_path)) is bool(by)
    model = repaired(BertForMaskedLM, tmp_path)
    assert not any(torch.equal(value, truth[key] + 1) for key, value in model.state_dict().items())
    assert bool(wrong(model, truth)) is bool(by)
    assert tiedquiet.check(model).ok is not bool(by)


@pytest.mark.parametrize("are_both_whole", [False, True])
@pytest.mark.parametrize("by", [0, 1])
@pytest.mark.parametrize("build", [bert, mixtral])
def test_of_two_copies_under_two_prefixes_none_need_be_the_right_one(
    build: Any, by: int, are_both_whole: bool, tmp_path: Path
) -> None:
    kind, truth = type(build()), written(build(), tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        student = {f"student.{name}": value for name, value in tensors.items()}
        teacher = {f"teacher.{name}": value + by for name, value in tensors.items()}
        if not are_both_whole:
            student.popitem()
        return student | teacher

    rewritten(tmp_path, change)
    assert ("is there as well, and has other values" in stopped(kind, tmp_path)) is bool(by)
    model = repaired(kind, tmp_path)
    assert not any(torch.equal(value, truth[key] + 1) for key, value in model.state_dict().items())
    assert bool(wrong(model, truth)) is bool(by)
    assert tiedquiet.check(model).ok is not bool(by)


@pytest.mark.skipif(transformers.__version__ == "5.0.0", reason="it cannot sort names that begin with a number")
def test_a_layer_of_another_copy_is_not_read_beside_layers_of_this_one(tmp_path: Path) -> None:
    """Each layer has its own prefix, and the teacher's first is whole, the student's is not."""
    kind = transformers.LlamaModel
    truth = written(kind(transformers.LlamaConfig(**SMALL)), tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        student = {name.removeprefix("layers."): value for name, value in tensors.items()}
        teacher = {f"teacher.{name}": value + 1 for name, value in student.items()}
        del student["0.post_attention_layernorm.weight"]
        return student | teacher

    rewritten(tmp_path, change)
    assert "is there as well, and has other values" in stopped(kind, tmp_path)
    model = repaired(kind, tmp_path)
    assert not any(torch.equal(value, truth[key] + 1) for key, value in model.state_dict().items())
    left = {key for key, verdict in verdicts(model).items() if verdict is Verdict.UNREAD}
    assert left == wrong(model, truth) == {key for key in truth if key.startswith("layers.")}


def test_two_rules_do_not_mix_two_copies() -> None:
    """Seed 10046 of benchmarks/damage: one tower's gaps were filled from another, which leads to all of it."""
    values = {f"{tower}.{name}": torch.full((2,), number) for number, tower in enumerate("ab", 1) for name in "xy"}
    model = torch.nn.Module()
    for name in "xy":
        model.register_parameter(name, torch.nn.Parameter(torch.zeros(2)))
    reading = reading_of(model, {"x", "y"}, Checkpoint(values))
    made = Made({"y": Origin(("b.y",), False)}, "", leads={"b.x": "x", "b.y": "y"})
    headers = {name: value.to("meta") for name, value in values.items()}
    for source, is_doubt in (("a.x", True), ("b.x", False), (None, False)):
        reading.found["x"] = Finding("x", Verdict.UNREAD, source)
        assert bool(doubts_of(reading, made, headers)) is is_doubt


@pytest.mark.parametrize("by", [0, 1])
def test_two_copies_of_which_names_lead_to_the_same(by: int, tmp_path: Path) -> None:
    """A wrapper's parts are taken out of names, and what is left of two copies is the same name."""
    truth = written(bert(), tmp_path)
    gaps = {f"{NORM}.weight", "bert.encoder.layer.0.output.dense.bias"}

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        left = {f"module.{name}": value for name, value in tensors.items() if name not in gaps}
        copied = {name: value + by for name, value in tensors.items() if name.startswith("bert.")}
        return left | {name.replace("bert.", "teacher."): value for name, value in copied.items()}

    rewritten(tmp_path, change)
    assert ("has other values" in stopped(BertForMaskedLM, tmp_path)) is bool(by)
    model = repaired(BertForMaskedLM, tmp_path)
    assert not any(torch.equal(model.state_dict()[key], truth[key] + 1) for key in gaps)
    assert tiedquiet.check(model).ok <= (not wrong(model, truth))


@pytest.mark.parametrize("is_other", [True, False])
def test_two_names_under_a_prefix_for_one_tensor(is_other: bool, tmp_path: Path) -> None:
    truth = written(bert(), tmp_path)
    names = {f"module.{NORM}.{new}": f"module.{NORM}.{old}" for new, old in (("weight", "gamma"), ("bias", "beta"))}

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        under = {f"module.{name}": value for name, value in tensors.items()}
        return under | {old: under[new] + is_other for new, old in names.items()}

    rewritten(tmp_path, change)
    assert ("as well, has other values" in stopped(BertForMaskedLM, tmp_path)) is is_other
    model = repaired(BertForMaskedLM, tmp_path)
    assert wrong(model, truth) == ({f"{NORM}.weight", f"{NORM}.bias"} if is_other else set())
    unread = {key for key, verdict in verdicts(model).items() if verdict is Verdict.UNREAD}
    assert unread == wrong(model, truth)
    assert tiedquiet.check(model).ok is not is_other


def test_another_copy_beside_a_run_s_checkpoint(tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "checkpoint-1"
    before = written(GPT2LMHeadModel(gpt2()), base)
    truth = {key: value + 2 for key, value in before.items()}
    GPT2LMHeadModel(gpt2()).save_pretrained(run)
    tensors = {key: truth[key] for key in load_file(base / "model.safetensors")}
    left = {key: value for key, value in tensors.items() if ".h.0." not in key}
    save_file({**left, **{f"ema.{k}": v + 1 for k, v in tensors.items()}}, run / "model.safetensors", {"format": "pt"})
    model = GPT2LMHeadModel.from_pretrained(base)
    with tiedquiet.enable("repair"):
        Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))._load_from_checkpoint(str(run))
    assert not wrong(model, {key: (truth if key in left or key == "lm_head.weight" else before)[key] for key in truth})
    found = {key for key, verdict in verdicts(model).items() if verdict is Verdict.UNREAD}
    assert found == tensors.keys() - left.keys()


def test_another_shape_of_some_under_a_prefix_of_what_is_converted(tmp_path: Path) -> None:
    """Experts are merged while they are read, so no prefix by itself leads to a name of the model."""
    truth = written(mixtral(), tmp_path)
    rewritten(
        tmp_path,
        lambda tensors: {
            f"module.{name}": torch.cat([value, value[:2]]) if "q_proj" in name else value
            for name, value in tensors.items()
        },
    )
    kind = type(mixtral())
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="unread"):
        kind.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    with tiedquiet.enable("repair"):
        model = kind.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert wrong(model, truth) == {key for key in truth if "q_proj" in key}
    assert not tiedquiet.check(model).ok


def test_what_is_split_while_it_is_read_is_told_of_each_part(tmp_path: Path) -> None:
    kind: Any = getattr(transformers, "NomicBertModel", None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no class whose matrices are split")
    model = kind(kind.config_class(**BERT))
    written(model, tmp_path)
    (name, value), *_ = [(n, v) for n, v in load_file(tmp_path / "model.safetensors").items() if "qkv" in n]
    in_two_shards(tmp_path, {name: value + 1})
    found = verdicts(kind.from_pretrained(tmp_path))
    parts = {key for key, verdict in found.items() if verdict is Verdict.AMBIGUOUS}
    assert {key.split(".")[-2] for key in parts} == {"q_proj", "k_proj", "v_proj"}

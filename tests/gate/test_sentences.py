"""Folders of sentence-transformers: every module of `modules.json` has a line, and no type is imported."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2LMHeadModel, T5ForConditionalGeneration

from tests.checkpoints import gpt2, t5
from tests.gate.test_check import check
from tests.gate.test_compare import bert
from tests.gate.test_resume import trained

OLD, NEW = "sentence_transformers.models.", "sentence_transformers.base.modules.x."
SAYS = "tensors have the names and shapes that its config asks for"


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def layer(folder: Path, config: dict[str, Any], **parts: nn.Module) -> None:
    write(folder / "config.json", config)
    save_file(nn.ModuleDict(parts).state_dict(), folder / "model.safetensors")


def modules(folder: Path, *entries: Any) -> None:
    listed = [
        {"idx": i, "name": str(i), "path": e[0], "type": e[1]} if type(e) is tuple else e for i, e in enumerate(entries)
    ]
    write(folder / "modules.json", listed)


@pytest.fixture(params=["", "0_Transformer"])
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """As the package writes it, in the root; and as it did when it was younger."""
    kinds = OLD if request.param else NEW
    BertModel(bert()).save_pretrained(tmp_path / request.param)
    write(tmp_path / request.param / "sentence_bert_config.json", {"transformer_task": "feature-extraction"})
    write(tmp_path / "1_Pooling" / "config.json", {"pooling_mode": "mean"})
    dense = {
        "in_features": 16,
        "out_features": 8,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    layer(tmp_path / "2_Dense", dense, linear=nn.Linear(16, 8))
    layer(tmp_path / "3_LayerNorm", {"dimension": 8}, norm=nn.LayerNorm(8))
    modules(
        tmp_path,
        (request.param, f"{kinds}Transformer"),
        ("1_Pooling", f"{kinds}Pooling"),
        ("2_Dense", f"{kinds}Dense"),
        ("3_LayerNorm", f"{kinds}LayerNorm"),
        ("4_Normalize", f"{kinds}Normalize"),  # an empty folder, which no repository keeps
    )
    return tmp_path


@pytest.fixture
def outcome(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, dict[str, Any]]]:
    def say(folder: Path, status: int, *options: str) -> dict[str, dict[str, Any]]:
        capsys.readouterr()
        assert check(folder, "--json", *options) == status
        return {found["component"]: found for found in json.loads(capsys.readouterr().out)["components"]}

    return say


def test_one_that_is_well(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert check(whole) == 0
    first, pooling, dense, norm, normalize, last = capsys.readouterr().out.splitlines()
    place = "0_Transformer" if (whole / "0_Transformer").exists() else "."
    assert first.startswith(f"{place}: BertModel: 23 of 23 tensors hold the file's bytes")
    assert pooling == "1_Pooling: Pooling: has no tensors"
    assert dense == f"2_Dense: Dense: 2 of 2 {SAYS}"
    assert norm == f"3_LayerNorm: LayerNorm: 2 of 2 {SAYS}"
    assert normalize == "4_Normalize: Normalize: has no tensors"
    assert last == "5 of 5 components are sound; 23 of 23 tensors hold the files' bytes"


def test_a_model_beside_the_list(whole: Path, outcome: Callable[..., dict[str, dict[str, Any]]]) -> None:
    """`from_pretrained` reads it from the same folder, whatever a list says; if it is on the list, it is checked once."""
    BertModel(bert()).save_pretrained(whole)
    assert outcome(whole, 0)["."]["class"] == "BertModel"
    (whole / "model.safetensors").write_bytes(b"junk")
    found = outcome(whole, 1)
    assert [key for key, component in found.items() if component["loud"]] == ["."]


def test_what_the_package_writes_and_reads(tmp_path: Path, outcome: Callable[..., dict[str, dict[str, Any]]]) -> None:
    """Against the real one, where it is installed: the names of its types, and of what it stores."""
    package = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules as theirs
    from transformers import BertTokenizerFast

    BertModel(bert()).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    BertTokenizerFast(str(tmp_path / "bert" / "vocab.txt")).save_pretrained(tmp_path / "bert")
    parts = [
        theirs.Transformer(str(tmp_path / "bert")), theirs.Pooling(16, "mean"), theirs.Dense(16, 8, use_residual=True),
        theirs.Dense(8, 4, bias=False), theirs.LayerNorm(4), theirs.Dropout(), theirs.Normalize(),
    ]  # fmt: skip
    package.SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "whole"))
    found = outcome(tmp_path / "whole", 0)
    assert [(one["held"], one["tensors"]) for one in found.values()] == [
        (23, 23), (0, 0), (3, 3), (1, 1), (2, 2), (0, 0), (0, 0),
    ]  # fmt: skip


@pytest.mark.parametrize("part", ["1_Pooling", "2_Dense", "3_LayerNorm"])
def test_a_module_that_is_not_there(part: str, whole: Path, outcome: Callable[..., dict[str, dict[str, Any]]]) -> None:
    shutil.rmtree(whole / part)
    found = outcome(whole, 1)
    assert {name for name, one in found.items() if one["loud"]} == {part}
    assert found[part]["error"] == "modules.json names it, but it is missing: it has no config.json"


def test_weights_that_are_not_there(whole: Path, outcome: Callable[..., dict[str, dict[str, Any]]]) -> None:
    (whole / "2_Dense" / "model.safetensors").unlink()
    assert outcome(whole, 1)["2_Dense"]["error"] == "it has none of model.safetensors, pytorch_model.bin"
    for path in whole.rglob("model.safetensors"):
        path.unlink()
    assert outcome(whole, 2) == {}


def test_a_pickle_and_what_lies_beside(whole: Path, outcome: Callable[..., dict[str, dict[str, Any]]]) -> None:
    path = whole / "2_Dense" / "model.safetensors"
    stored = load_file(path)
    torch.save({**stored, "linear.bias": stored["linear.bias"] + 1}, path.with_name("pytorch_model.bin"))
    (finding,) = outcome(whole, 1)["2_Dense"]["findings"]
    assert finding["verdict"] == "ambiguous"
    path.unlink()
    assert outcome(whole, 0)["2_Dense"]["files"] == [str(path.with_name("pytorch_model.bin"))]


def test_tensors_that_are_not_those_of_the_config(
    whole: Path, outcome: Callable[..., dict[str, dict[str, Any]]]
) -> None:
    path = whole / "2_Dense" / "model.safetensors"
    save_file({"linear.weight": torch.ones(4, 16), "x": torch.ones(1)}, path)
    found = outcome(whole, 1)["2_Dense"]
    assert (found["held"], found["missing"], found["unexpected"]) == (0, ["linear.bias"], ["x"])
    (finding,) = found["findings"]
    assert finding["why"] == "it is (4, 16) in the file, but (8, 16) by its config"
    assert found["problem"] == "sentence-transformers refuses a file with more tensors than these"
    path.write_bytes(b"junk")
    assert outcome(whole, 1)["2_Dense"]["error"].startswith("model.safetensors cannot be read: ")


def test_codes_without_a_scale(whole: Path, outcome: Callable[..., dict[str, dict[str, Any]]]) -> None:
    """The package reads them as numbers; a bias of whole numbers may be one."""
    path = whole / "2_Dense" / "model.safetensors"
    save_file({name: tensor.mul(100).to(torch.int8) for name, tensor in load_file(path).items()}, path)
    found = outcome(whole, 1)["2_Dense"]
    assert (found["held"], found["missing"]) == (1, ["linear.weight"])
    assert [one["why"] for one in found["findings"]] == ["the file has int8 codes for it, and no scale"]


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"in_features": 4, "out_features": 4}, ["linear.weight", "linear.bias"]),
        ({"in_features": 4, "out_features": 4, "bias": False}, ["linear.weight"]),
        (
            {"in_features": 4, "out_features": 2, "bias": False, "use_residual": True},
            ["linear.weight", "residual.weight"],
        ),
        ({"in_features": 4, "out_features": True}, None),
        ({"in_features": -1, "out_features": 2}, None),
        ({}, None),
    ],
)
def test_which_tensors_a_dense_layer_has(
    config: dict[str, Any],
    names: list[str] | None,
    whole: Path,
    outcome: Callable[..., dict[str, dict[str, Any]]],
) -> None:
    shape = config.get("out_features"), config.get("in_features")
    tensors = {name: torch.ones(shape[:1] if "bias" in name else shape) for name in names or ()}
    save_file(tensors, whole / "2_Dense" / "model.safetensors")
    write(whole / "2_Dense" / "config.json", config)
    found = outcome(whole, int(names is None))["2_Dense"]
    assert (found["held"] == len(tensors)) if names else "does not say how large it is" in found["error"]


def test_types_and_folders_of_strangers(
    whole: Path, outcome: Callable[..., dict[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(whole)
    monkeypatch.syspath_prepend(str(whole))
    known = json.loads((whole / "modules.json").read_text())[0]
    entries = [
        ("a", "evil.Dense"),
        ("b", "Dense"),
        ("../x", f"{OLD}Dense"),
        7,
        {"path": 1, "type": "x"},
        ("c", f"{OLD}LSTM"),
    ]
    modules(whole, known, *entries)
    found = outcome(whole, 1)
    assert {name: one["error"] for name, one in found.items() if one["error"]} == {
        "a": "its type is evil.Dense, which is not one of sentence-transformers' own",
        "b": "its type is Dense, which is not one of sentence-transformers' own",
        "../x": "modules.json names a folder outside this one",
        "4": "modules.json does not give both its folder and its type",
        "5": "modules.json does not give both its folder and its type",
        "c": f"its type is {OLD}LSTM, whose tensors are not known",
    }
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    ("content", "says"),
    [("[]", "modules.json names no module"), ("{}", "does not hold a JSON list"), ("[7]", "does not give both")],
)
def test_a_list_of_nothing(content: str, says: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (whole / "modules.json").write_text(content)
    assert check(whole) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_the_class_is_that_of_the_package_not_of_the_config(
    tmp_path: Path, outcome: Callable[..., dict[str, dict[str, Any]]]
) -> None:
    T5ForConditionalGeneration(t5()).save_pretrained(tmp_path)
    modules(tmp_path, ("", f"{OLD}Transformer"))
    assert outcome(tmp_path, 0)["."]["class"] == "T5EncoderModel"
    BertForMaskedLM(BertConfig(**bert().to_dict())).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    modules(tmp_path, ("", "sentence_transformers.sparse_encoder.models.MLMTransformer"))
    assert outcome(tmp_path, 0)["."]["class"] == "BertForMaskedLM"
    write(tmp_path / "sentence_bert_config.json", {"transformer_task": "feature-extraction"})
    assert outcome(tmp_path, 1)["."]["class"] == "BertModel"  # its pooler is in no file
    write(tmp_path / "sentence_bert_config.json", {"transformer_task": ["x"]})
    assert outcome(tmp_path, 2) == {}


def test_other_options(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(whole, "--lora", "x.safetensors") == 2
    assert "is not a model of diffusers" in capsys.readouterr().err
    if not (whole / "0_Transformer").exists():
        assert check(whole, "--class", "BertModel") == 0
        assert capsys.readouterr().out.startswith("BertModel: 23 of 23")


def test_a_trainer_s_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The package's own trainer reads all of the folder: what transformers' would read says nothing."""
    folder = trained(GPT2LMHeadModel(gpt2()), tmp_path)
    modules(folder, ("", f"{OLD}Transformer"))
    capsys.readouterr()
    assert check(folder) == 0
    assert "Trainer" not in capsys.readouterr().out

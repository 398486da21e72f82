"""What transformers renames for another class than the one that is loaded, and what it mixes up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTModel,
    GPT2Config,
    PixioBackbone,
    PixioConfig,
    PreTrainedModel,
)

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.renamed import CLIP, mapping_of, register_as, stopped_and_repaired, verdicts, written, wrong
from tests.doors.training import trainer_of
from tiedquiet import LoadError, Verdict


class MyTextModel(CLIPTextModel):
    """A subclass, which transformers does not rename for (5.6 and newer)."""


class IgnoringTextModel(CLIPTextModel):
    """One that says of all these names that it has no place for them: they are those of a whole model."""

    _keys_to_ignore_on_load_unexpected = [r"^text_model\."]  # noqa: RUF012


@pytest.mark.parametrize("kind", [MyTextModel, IgnoringTextModel])
def test_a_subclass_gets_the_renaming_of_its_class(kind: Any, tmp_path: Path, printed: Printed) -> None:
    written(CLIPTextModel(CLIPTextConfig(**CLIP)), tmp_path, lambda k: "text_model." + k.removeprefix("text_model."))
    truth = CLIPTextModel.from_pretrained(tmp_path).state_dict()
    model = kind.from_pretrained(tmp_path)
    if not wrong(model, truth):
        pytest.skip("this release renames nothing of it")
    assert set(verdicts(model).values()) == {Verdict.UNREAD}
    said = f"transformers renames what it reads for CLIPTextModel, but not for its subclass {kind.__name__}"
    assert said in printed.loud[0]
    with tiedquiet.enable("repair"):
        assert not wrong(kind.from_pretrained(tmp_path), truth)
    if kind is MyTextModel:
        assert not wrong(kind.from_pretrained(tmp_path, key_mapping=mapping_of(printed.loud[0])), truth)


def test_what_was_read_and_is_there_under_its_old_name_as_well(tmp_path: Path, printed: Printed) -> None:
    written(CLIPTextModel(CLIPTextConfig(**CLIP)), tmp_path, lambda k: "text_model." + k.removeprefix("text_model."))
    truth = CLIPTextModel.from_pretrained(tmp_path).state_dict()
    twice = next(iter(key for key in truth if key.endswith("final_layer_norm.weight")))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {twice: truth[twice].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    model = MyTextModel.from_pretrained(tmp_path)
    assert verdicts(model) == dict.fromkeys(wrong(model, truth), Verdict.UNREAD)
    with tiedquiet.enable("repair"):
        assert not wrong(MyTextModel.from_pretrained(tmp_path), truth)


class WithMapping(PreTrainedModel):
    """Written for transformers 4 and up to 5.3, where a class says itself what files call its tensors."""

    config_class = GPT2Config
    _checkpoint_conversion_mapping = {r"^old\.": "norm."}  # noqa: RUF012

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.norm, self.head = torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)
        self.post_init()


def test_the_mapping_that_a_class_carries(tmp_path: Path, printed: Printed) -> None:
    truth = written(WithMapping(GPT2Config()), tmp_path, lambda key: key.replace("norm.", "old."))
    model = WithMapping.from_pretrained(tmp_path)
    assert verdicts(model) == {"norm.weight": Verdict.UNREAD, "norm.bias": Verdict.UNREAD}
    assert "because transformers does not read WithMapping._checkpoint_conversion_mapping" in printed.loud[0]
    mapping = mapping_of(printed.loud[0])
    assert mapping == WithMapping._checkpoint_conversion_mapping
    assert not wrong(WithMapping.from_pretrained(tmp_path, key_mapping=mapping), truth)
    model = stopped_and_repaired(WithMapping, tmp_path)
    assert not wrong(model, truth)
    assert tiedquiet.check(model).ok


def test_a_mapping_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(WithMapping(GPT2Config()), tmp_path, lambda key: key.replace("norm.", "old."))
    monkeypatch.setattr(WithMapping, "_checkpoint_conversion_mapping", {"^(": "norm."})
    with tiedquiet.enable("strict"):
        model = WithMapping.from_pretrained(tmp_path)
    assert verdicts(model).keys() >= {"norm.weight", "norm.bias"}
    assert not tiedquiet.check(model).ok


class Trunk(PreTrainedModel):
    """A base model with a norm."""

    config_class = GPT2Config
    base_model_prefix = "trunk"

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.norm = torch.nn.LayerNorm(4)
        self.post_init()


class WithNorm(PreTrainedModel):
    """And one around it that has a norm of its own, of the same name."""

    config_class = GPT2Config
    base_model_prefix = "trunk"

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.trunk = Trunk(config)
        self.norm = torch.nn.LayerNorm(4)
        self.post_init()


@pytest.mark.parametrize("differ", [True, False])
def test_two_that_transformers_mixes_up(differ: bool, tmp_path: Path, printed: Printed) -> None:
    saved = WithNorm(GPT2Config())
    if differ:
        torch.nn.init.constant_(saved.norm.weight, 2.0)
        torch.nn.init.constant_(saved.trunk.norm.weight, 3.0)
    saved.save_pretrained(tmp_path)
    model = WithNorm.from_pretrained(tmp_path)
    if not differ:
        assert tiedquiet.check(model).ok
        assert not printed.loud
        return
    if not wrong(model, saved.state_dict()):
        pytest.skip("this release reads them right")
    assert verdicts(model) == {"norm.weight": Verdict.UNREAD, "trunk.norm.weight": Verdict.UNREAD}
    assert {f.key: f.source for f in tiedquiet.check(model).findings} == {key: key for key in verdicts(model)}
    assert "adds trunk. to some names, takes it off others, and so mixes up these tensors" in printed.loud[0]
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="unread, 2 of 4"):
        WithNorm.from_pretrained(tmp_path)
    with tiedquiet.enable("repair"):
        model = WithNorm.from_pretrained(tmp_path)
    assert not wrong(model, saved.state_dict())
    assert tiedquiet.check(model).ok
    assert tiedquiet.check(model, tmp_path).ok


def test_two_that_are_mixed_up_on_disk(tmp_path: Path, printed: Printed) -> None:
    """There they are read anew whenever they are needed, and stay mixed up."""
    pytest.importorskip("accelerate")
    saved = WithNorm(GPT2Config())
    torch.nn.init.constant_(saved.trunk.norm.weight, 3.0)
    saved.save_pretrained(tmp_path / "files")
    places = {"device_map": {"trunk": "disk", "norm": "cpu"}, "offload_folder": tmp_path / "disk"}
    for mode, left in ("on", {"norm.weight", "trunk.norm.weight"}), ("repair", {"trunk.norm.weight"}):
        with tiedquiet.enable(mode):
            model = WithNorm.from_pretrained(tmp_path / "files", **places)
        assert model.trunk.norm.weight.is_meta
        found = {key for key, verdict in verdicts(model).items() if verdict is Verdict.UNREAD}
        assert found == left
        assert not tiedquiet.check(model).ok
    assert "Rename one of the two modules, and its tensors in the file" in printed.loud[-1]
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="unread"):
        WithNorm.from_pretrained(tmp_path / "files", **places)


@pytest.mark.parametrize(
    ("lacking", "other"), [("norm.weight", "trunk.norm.weight"), ("trunk.norm.weight", "norm.weight")]
)
def test_one_that_is_missing_because_it_was_read_into_the_other(
    lacking: str, other: str, tmp_path: Path, printed: Printed
) -> None:
    saved = WithNorm(GPT2Config())
    torch.nn.init.constant_(saved.get_parameter(other), 3.0)
    saved.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[lacking]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    if WithNorm.from_pretrained(tmp_path).get_parameter(lacking)[0] != 3:
        pytest.skip("this release reads it right")
    for mode in ("on", "repair"):
        with tiedquiet.enable(mode):
            model = WithNorm.from_pretrained(tmp_path)
        assert verdicts(model) == {other: Verdict.UNREAD, lacking: Verdict.MISSING}
        assert f"it was given what is {other} there" in str(tiedquiet.check(model))
    assert "Rename one of the two modules, and its tensors in the file" in printed.loud[0]
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="unread, 1 of 4"):
        WithNorm.from_pretrained(tmp_path)


def test_a_resume_gives_neither_what_the_file_has_for_the_other(tmp_path: Path) -> None:
    """Trainer reads each under its own name."""
    saved = WithNorm(GPT2Config())
    torch.nn.init.constant_(saved.norm.weight, 3.0)
    saved.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["of.another"] = tensors.pop("trunk.norm.weight")[:2].clone()  # and something is left over
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for mode in ("on", "repair"):
        model = WithNorm(GPT2Config())
        with tiedquiet.enable(mode):
            trainer_of(model, tmp_path / "run")._load_from_checkpoint(str(tmp_path))
        assert verdicts(model) == {"trunk.norm.weight": Verdict.MISSING}
        assert model.norm.weight[0] == 3
        assert model.trunk.norm.weight[0] == 1


class Zoo(Trunk):
    """A base model whose prefix comes after the name of its norm: transformers keeps what it takes first."""

    base_model_prefix = "zoo"

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.lin = torch.nn.Linear(4, 4)
        self.post_init()


class Alps(Zoo):
    """And one whose prefix comes before it."""

    base_model_prefix = "alps"


@pytest.mark.parametrize("kind", [Zoo, Alps])
@pytest.mark.parametrize("how", ["of a head", "of nobody", "twice"])
def test_the_base_model_by_itself_gets_no_norm_of_the_head(
    kind: Any, how: str, tmp_path: Path, printed: Printed
) -> None:
    prefix = f"{kind.base_model_prefix}."
    truth = written(kind(GPT2Config()), tmp_path, lambda key: prefix + key)
    others = {key: value + 1 for key, value in truth.items() if how == "twice" or "norm" in key}
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | others, tmp_path / "model.safetensors", {"format": "pt"})
    if how != "of nobody":
        config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["WithHead"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
    model = kind.from_pretrained(tmp_path)
    found = verdicts(model)
    if how != "of a head":  # whose values are they?
        assert set(found) == set(others)
        assert set(found.values()) == {Verdict.AMBIGUOUS}
        return
    assert found == dict.fromkeys(wrong(model, truth), Verdict.UNREAD)
    if found:
        assert "adds zoo. to some names, takes it off others, and so mixes up these tensors" in printed.loud[0]
        model = stopped_and_repaired(kind, tmp_path)
    assert not wrong(model, truth)
    assert tiedquiet.check(model).ok
    assert tiedquiet.check(model, tmp_path).ok


class UsersBackbone(PixioBackbone):
    """A subclass of one whose file has its base model under another prefix, which 5.13 does not rename for it."""


@pytest.mark.parametrize("lacking", ["", "layernorm.bias"])
def test_two_that_are_mixed_up_under_the_names_of_another_class(lacking: str, tmp_path: Path, printed: Printed) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
    saved = PixioBackbone(PixioConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    for number, parameter in enumerate(saved.parameters(), start=2):
        torch.nn.init.constant_(parameter, float(number))
    saved.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop(lacking, None)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    truth = saved.state_dict()
    for mode in ("on", "repair"):
        with tiedquiet.enable(mode):
            model = UsersBackbone.from_pretrained(tmp_path)
        # What is missing may be drawn, or be given another's values.
        assert wrong(model, truth) - {lacking} == verdicts(model).keys() - {lacking}
    left = {"layernorm.bias", "layernorm.weight"} | ({"pixio.layernorm.bias"} if lacking else set())
    assert verdicts(model).keys() <= left, "repair puts right all that the loader gave another's values"


def test_a_base_model_s_file_has_no_norm_of_the_head(tmp_path: Path, printed: Printed) -> None:
    saved = Trunk(GPT2Config())
    torch.nn.init.constant_(saved.norm.weight, 3.0)
    saved.save_pretrained(tmp_path)
    model = WithNorm.from_pretrained(tmp_path)
    assert model.trunk.norm.weight[0] == 3
    assert verdicts(model) == {"norm.weight": Verdict.MISSING, "norm.bias": Verdict.MISSING}
    assert not printed.loud


def test_a_base_model_s_file_gets_the_renaming_of_the_base_model(
    tmp_path: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers 5.9 to 5.13 read nothing of it but the embeddings: there a ViT starts from noise."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    saved = DeiTModel(DeiTConfig(**small, image_size=16, patch_size=8))
    saved.save_pretrained(tmp_path)
    truth = {f"deit.{key}": value for key, value in saved.state_dict().items() if not key.startswith("pooler")}
    model = DeiTForImageClassification.from_pretrained(tmp_path)
    heads = {"classifier.weight": Verdict.MISSING, "classifier.bias": Verdict.MISSING}
    if not wrong(model, truth):
        assert verdicts(model) == heads
        pytest.skip("this release reads it")
    found = verdicts(model)
    assert {key for key, verdict in found.items() if verdict is Verdict.UNREAD} == found.keys() - heads
    assert "renames what it reads for DeiTModel, but not for DeiTForImageClassification around it" in printed.loud[0]
    line = printed.loud[0]
    model = stopped_and_repaired(DeiTForImageClassification, tmp_path)
    assert not wrong(model, truth)
    assert verdicts(model) == heads
    register_as(line, monkeypatch)
    model = DeiTForImageClassification.from_pretrained(tmp_path)
    assert not wrong(model, truth)
    assert verdicts(model) == heads

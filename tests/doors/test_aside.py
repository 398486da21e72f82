"""Models whose values accelerate keeps elsewhere by the time they are judged: in main memory for a GPU, or on disk."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2LMHeadModel

import tiedquiet
from tests.checkpoints import Printed, gpt2, save
from tests.idioms import Idiom, Tiny
from tiedquiet import LoadError, Verdict


class Offloads(GPT2LMHeadModel):
    """What a device map with a GPU in it comes to: all values are in main memory, and brought there when needed."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().from_pretrained(*args, **kwargs)
        cls.change(model)
        accelerate.cpu_offload(model, execution_device="cpu")
        return model

    @staticmethod
    def change(model: Any) -> None: ...


class Parts(Offloads):
    @staticmethod
    def change(model: Any) -> None:
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))


class Copies(Offloads):
    @staticmethod
    def change(model: Any) -> None:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def kept(model: Any, name: str) -> torch.Tensor:
    """What a forward pass would find."""
    path, _, last = name.rpartition(".")
    tensor: torch.Tensor = model.get_submodule(path)._hf_hook.weights_map[last]
    return tensor


@pytest.mark.parametrize(
    ("cls", "verdict"), [(Offloads, Verdict.TIED), (Copies, Verdict.COPIED), (Parts, Verdict.UNTIED)]
)
def test_a_tie_is_judged_by_the_values_that_are_kept(
    cls: Any, verdict: Verdict, tmp_path: Path, printed: Printed
) -> None:
    save(cls(gpt2()), tmp_path)
    for mode in ("on", "repair"):
        with tiedquiet.enable(mode):
            model = cls.from_pretrained(tmp_path)
        (found,) = tiedquiet.check(model).findings
        assert model.lm_head.weight.is_meta
        assert (found.key, found.verdict) == ("lm_head.weight", verdict)
        is_equal = torch.equal(kept(model, "lm_head.weight"), kept(model, "transformer.wte.weight"))
        assert is_equal is (verdict is not Verdict.UNTIED), f"{mode}: nothing that is kept elsewhere was tied"
    loud = printed.of("tiedquiet", logging.WARNING)
    assert [": untied, " in line for line in loud] == ([True] * 2 if verdict is Verdict.UNTIED else [])
    with tiedquiet.enable("strict"):
        if verdict is Verdict.UNTIED:
            with pytest.raises(LoadError, match=r"lm_head\.weight is not transformer\.wte\.weight"):
                cls.from_pretrained(tmp_path)
        else:
            cls.from_pretrained(tmp_path)


class KeepsOthers(GPT2LMHeadModel):
    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().from_pretrained(*args, **kwargs)
        others = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
        accelerate.cpu_offload(model, execution_device="cpu", state_dict=others)
        return model


def test_other_values_than_those_that_were_read_may_be_kept(tmp_path: Path) -> None:
    stored = save(KeepsOthers(gpt2()), tmp_path).keys() - {"lm_head.weight"}
    for mode in ("on", "repair"):
        with tiedquiet.enable(mode):
            proof = tiedquiet.check(KeepsOthers.from_pretrained(tmp_path))
        assert {f.key for f in proof.findings if f.verdict is Verdict.OVERWRITTEN} == stored
        assert proof.stored == 0
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match=r"LOST after they were read: .*from_pretrained"):
        KeepsOthers.from_pretrained(tmp_path)


def test_a_new_head_stays_one_when_it_is_kept_elsewhere(tmp_path: Path) -> None:
    save(Offloads(gpt2()), tmp_path, flag=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2Model"]}))
    with tiedquiet.enable("strict"):
        model = Offloads.from_pretrained(tmp_path)
    (found,) = tiedquiet.check(model).findings
    assert (found.verdict, found.broken) == (Verdict.UNTIED, False)


def by_disk_offload(model: Any, folder: Path) -> None:
    accelerate.disk_offload(model, str(folder), execution_device="cpu")


def by_cpu_offload(model: Any, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device="cpu")


@pytest.mark.parametrize("offload", [by_cpu_offload, by_disk_offload])
def test_what_is_offloaded_after_its_load_is_still_tied(offload: Callable[[Any, Path], None], tmp_path: Path) -> None:
    save(GPT2LMHeadModel(gpt2()), tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    offload(model, tmp_path / "disk")
    assert tiedquiet.check(model).ok


def test_a_tie_that_came_apart_before_its_ends_were_put_aside_is_told(tmp_path: Path) -> None:
    save(GPT2LMHeadModel(gpt2()), tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    Parts.change(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    (found,) = tiedquiet.check(model).findings
    assert (found.verdict, found.since) == (Verdict.UNTIED, True)


class Scaled(Tiny):
    def add(self, config: Any) -> None:
        self.scale = nn.Parameter(torch.empty(8))  # which `_init_weights` leaves as it is


class OffloadsScaled(Scaled):
    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        model: Any = super().from_pretrained(*args, **kwargs)
        accelerate.cpu_offload(model, execution_device="cpu")
        return model


def test_memory_that_nobody_wrote_is_told_of_what_is_kept_elsewhere(tmp_path: Path) -> None:
    Idiom(OffloadsScaled, missing=("scale",)).save(tmp_path)
    model = OffloadsScaled.from_pretrained(tmp_path)
    assert model.scale.is_meta
    found = {finding.key: finding.verdict for finding in tiedquiet.check(model).findings}
    assert found == {"scale": Verdict.UNWRITTEN}


class Newline(nn.Module):
    """As in LLaVA-NeXT: a parameter beside models."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.ones(4))
        self.lin = nn.Linear(3, 5)


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match")
def test_a_parameter_that_stays_on_disk_by_itself_has_nothing_that_reads_it(tmp_path: Path) -> None:
    class Has(Tiny):
        def add(self, config: Any) -> None:
            self.inner = Newline()

    Idiom(Has).save(tmp_path / "model")
    places = dict.fromkeys(("embed", "part", "head", "lin"), "cpu") | {"inner.row": "disk", "inner.lin": "disk"}
    model: Any = Has.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    assert model.inner.row.is_meta
    assert model.inner.lin.weight.is_meta
    found = {finding.key: (finding.verdict, finding.why) for finding in tiedquiet.check(model).findings}
    assert found == {"inner.row": (Verdict.UNPROVEN, "its values stay on disk, and nothing reads them")}


def test_what_stays_on_disk_in_another_shape_is_told(tmp_path: Path, printed: Printed) -> None:
    save(GPT2LMHeadModel(gpt2()), tmp_path)
    places = dict.fromkeys(("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"), "cpu")
    how: dict[str, Any] = {"device_map": {**places, "transformer.h": "disk"}, "offload_folder": tmp_path / "disk"}
    with tiedquiet.enable("strict"):
        assert tiedquiet.check(GPT2LMHeadModel.from_pretrained(tmp_path, **how)).ok
    key = "transformer.h.0.mlp.c_fc.bias"
    file = load_file(tmp_path / "model.safetensors")
    right, file[key] = tuple(file[key].shape), torch.ones(3)
    save_file(file, tmp_path / "model.safetensors", {"format": "pt"})
    model = GPT2LMHeadModel.from_pretrained(tmp_path, **how)
    with pytest.raises(ValueError, match="Trying to set a tensor of shape"):
        model(torch.arange(3)[None])  # so late
    proof = tiedquiet.check(model)
    assert (proof.ok, proof.unread) == (False, 1)
    why = f"{key}: what lies on disk for it has the shape (3,), and not {right}"
    assert f"unread, {why}. Load it without disk offload" in "".join(printed.of("tiedquiet", logging.WARNING))
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="what lies on disk for it"):
        GPT2LMHeadModel.from_pretrained(tmp_path, **how)

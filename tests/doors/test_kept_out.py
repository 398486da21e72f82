"""What a class keeps out of its state dict: no checkpoint has it, and transformers does not look at it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedModel

import tiedquiet
from tests.checkpoints import Printed, gpt2, save
from tests.compat import cases
from tests.idioms import Idiom, Tiny
from tiedquiet import LoadError, Verdict


def verdicts(model: Any) -> dict[str, Verdict]:
    return {finding.key: finding.verdict for finding in tiedquiet.check(model).findings}


class Overrides(cases.OverridesTieWeights):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        state.pop("transformer.wte.weight", None)
        return state


class Hooks(cases.OverridesTieWeights):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer.register_state_dict_post_hook(self.keep_back)

    @staticmethod
    def keep_back(module: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, _: object) -> None:
        del state[f"{prefix}wte.weight"]


@pytest.mark.parametrize("keeps_back", [Overrides, Hooks])
def test_a_tensor_kept_out_of_the_state_dict_counts_as_not_stored(
    keeps_back: type[PreTrainedModel], tmp_path: Path, printed: Printed
) -> None:
    save(GPT2LMHeadModel(gpt2()), tmp_path)
    loaded = keeps_back.from_pretrained(tmp_path)
    assert Verdict.TIED not in verdicts(loaded).values()


class SavesNothing(torch.nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None: ...


def empty(module: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, _: object) -> None:
    for name in ("weight", "bias"):
        del state[prefix + name]


class OfALayer(Tiny):
    def add(self, config: Any) -> None:
        self.frozen = SavesNothing(2, 2)


class OfAHook(Tiny):
    def add(self, config: Any) -> None:
        self.frozen = torch.nn.Linear(2, 2)
        self.frozen.register_state_dict_post_hook(empty)


class OfTheModel(Tiny):
    def add(self, config: Any) -> None:
        self.frozen = torch.nn.Linear(2, 2)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in state.items() if not name.startswith("frozen.")}


@pytest.mark.parametrize("keeps_back", [OfALayer, OfAHook, OfTheModel])
def test_a_tensor_kept_out_of_the_state_dict_is_not_counted(
    keeps_back: type[Tiny], tmp_path: Path, printed: Printed
) -> None:
    """And has no values: transformers looks through the state dict for what is still on meta."""
    file = Idiom(keeps_back).save(tmp_path)
    proof = tiedquiet.check(keeps_back.from_pretrained(tmp_path))
    assert (proof.stored, proof.total) == (len(file), len(file))
    kept_out = [("frozen.bias", Verdict.UNWRITTEN), ("frozen.weight", Verdict.UNWRITTEN)]
    assert [(f.key, f.verdict) for f in proof.findings] == kept_out
    (said,) = printed.loud
    assert "on meta, where nothing has values: frozen.bias, frozen.weight" in said
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match=r"on meta.*frozen\.weight"):
        keeps_back.from_pretrained(tmp_path)


class OfAHookWithValues(OfAHook):
    def add(self, config: Any) -> None:
        super().add(config)
        self.frozen = torch.nn.utils.skip_init(torch.nn.Linear, 2, 2, device="cpu")
        self.frozen.register_state_dict_post_hook(empty)


class OfABuffer(Tiny):
    def add(self, config: Any) -> None:
        self.register_buffer("table", torch.arange(3.0))
        self.register_state_dict_post_hook(self.keep_back)

    @staticmethod
    def keep_back(module: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, _: object) -> None:
        del state[f"{prefix}table"]


def test_a_tensor_kept_out_of_the_state_dict_that_has_values_is_no_finding(tmp_path: Path, printed: Printed) -> None:
    Idiom(OfAHookWithValues).save(tmp_path)
    with tiedquiet.enable("strict"):
        assert tiedquiet.check(OfAHookWithValues.from_pretrained(tmp_path)).ok


def test_repair_computes_a_buffer_kept_out_of_the_state_dict(tmp_path: Path, printed: Printed) -> None:
    Idiom(OfABuffer).save(tmp_path)
    assert verdicts(OfABuffer.from_pretrained(tmp_path)) == {"table": Verdict.UNWRITTEN}
    with tiedquiet.enable("repair"):
        loaded = OfABuffer.from_pretrained(tmp_path)
    assert loaded.table.tolist() == [0.0, 1.0, 2.0]
    assert tiedquiet.check(loaded).ok


class WithItsOwnContext(OfABuffer):
    @classmethod
    def get_init_context(cls, *args: Any, **kwargs: Any) -> Any:
        return super().get_init_context(*args, **kwargs)


def test_repair_computes_it_with_another_function_around_what_is_asked_for_its_arguments(tmp_path: Path) -> None:
    """A class's own, another package's wrapper, or wrapt's where it runs without its extension."""
    Idiom(WithItsOwnContext).save(tmp_path)
    with tiedquiet.enable("repair"):
        loaded = WithItsOwnContext.from_pretrained(tmp_path)
    assert loaded.table.tolist() == [0.0, 1.0, 2.0]

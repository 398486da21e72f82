"""Classes of the user's that extend `Trainer`, and override what tiedquiet wraps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.training import DATA, differing, llava, right
from tiedquiet import LoadError


class IsSilent(Trainer):
    """Nobody reads those lists."""

    def _issue_warnings_after_load(self, lists: Any) -> None:
        pass


class Reads(Trainer):
    """Reads the file itself."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        tensors = load_file(Path(resume_from_checkpoint, "model.safetensors"))
        self._issue_warnings_after_load((model or self.model).load_state_dict(tensors, strict=False))


class Adds(Trainer):
    """Does more around what it overrides."""

    told = 0

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(str(Path(resume_from_checkpoint)), model)

    def _load_best_model(self) -> None:
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        type(self).told += 1
        super()._issue_warnings_after_load(load_result)


KINDS = [IsSilent, Reads, Adds]


def resumed(kind: type[Trainer], folder: Path, way: str = "resume") -> Any:
    model = LlavaForConditionalGeneration.from_pretrained(folder / "base")
    arguments = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)
    trainer = kind(model, arguments, train_dataset=DATA)
    if way == "resume":
        trainer._load_from_checkpoint(str(folder / "checkpoint-2"))
    else:
        trainer.state.best_model_checkpoint = str(folder / "checkpoint-2")
        trainer._load_best_model()
    return model


@pytest.mark.parametrize("way", ["resume", "best"])
@pytest.mark.parametrize("make", [lambda kind: kind, lambda kind: type("Own", (kind,), {})], ids=["itself", "extended"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_an_override_leaves_unread_is_told(kind: Any, make: Any, way: str, runs: Any, printed: Printed) -> None:
    folder, truth = runs(llava), right(llava, runs(llava) / "checkpoint-2")
    printed.records.clear()
    model = resumed(make(kind), folder, way)
    assert tiedquiet.check(model).unread == len(truth) >= len(differing(model, truth)) > 0
    (line,) = printed.loud
    assert f"{folder / 'checkpoint-2'}: unread, " in line
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="unread"):
        resumed(make(kind), folder, way)
    printed.records.clear()
    with tiedquiet.enable("repair"):
        model = resumed(make(kind), folder, way)
    assert differing(model, truth) == set()
    assert tiedquiet.check(model).ok
    assert not printed.loud


def test_an_override_is_called_once_and_put_back(runs: Any) -> None:
    before = {name: vars(Adds)[name] for name in vars(Adds) if name.startswith(("_load", "_issue"))}
    Adds.told = 0
    resumed(Adds, runs(llava))
    assert Adds.told == 1
    tiedquiet.disable()
    try:
        now = {name: vars(Adds)[name] for name in before}
        assert not any(hasattr(function, "__wrapped__") for function in now.values())
        assert torch.is_tensor(resumed(Adds, runs(llava)).lm_head.weight)
    finally:
        tiedquiet.enable()

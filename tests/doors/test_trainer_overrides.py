"""Classes of the user's that extend `Trainer`, and override what tiedquiet wraps."""

import copy
import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, MixtralForCausalLM, Trainer, TrainingArguments

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.training import DATA, LOSSY, differing, llama, llava, mixtral, right, state
from tiedquiet import LoadError, Verdict


class IsSilent(Trainer):
    """Nobody reads those lists."""

    def _issue_warnings_after_load(self, lists: Any) -> None:
        pass


class Reads(Trainer):
    """Reads the file itself."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        tensors = load_file(Path(resume_from_checkpoint, "model.safetensors"))
        self._issue_warnings_after_load((model or self.model).load_state_dict(tensors, strict=False))


class SaysNothing(Trainer):
    """Reads the file itself, and tells nobody what was missing."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        (model or self.model).load_state_dict(load_file(Path(resume_from_checkpoint, "model.safetensors")), False)


class Filters(Trainer):
    """Takes out what has no place before it reads the rest, and so tells nobody what that was."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model, tensors = model or self.model, load_file(Path(resume_from_checkpoint, "model.safetensors"))
        model.load_state_dict({k: v for k, v in tensors.items() if k in model.state_dict()}, strict=False)


class RenamesItself(Trainer):
    """Reads what it finds, and then the rest under the names that `from_pretrained` would give it."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = model or self.model
        model.load_state_dict(load_file(Path(resume_from_checkpoint, "model.safetensors")), strict=False)
        loaded = type(model).from_pretrained(resume_from_checkpoint)
        model.load_state_dict(loaded.state_dict())


class CopiesTheRest(Trainer):
    """The same, past `load_state_dict`."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = model or self.model
        model.load_state_dict(load_file(Path(resume_from_checkpoint, "model.safetensors")), strict=False)
        loaded = type(model).from_pretrained(resume_from_checkpoint).state_dict()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(loaded[name])


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


SilentByLambda = type("SilentByLambda", (Trainer,), {"_issue_warnings_after_load": lambda self, _: None})
KINDS = [IsSilent, SilentByLambda, Reads, Adds]


def resumed(kind: type[Trainer], folder: Path, way: str = "resume", build: Any = llava) -> Any:
    model = type(build()).from_pretrained(folder / "base")
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


def test_another_model_than_the_trainer_s(runs: Any) -> None:
    """What is read into that one is judged and repaired, and the trainer's own is left alone."""
    folder, truth = runs(llava), right(llava, runs(llava) / "checkpoint-2")
    own, other = (LlavaForConditionalGeneration.from_pretrained(folder / "base") for _ in range(2))
    before = state(own)
    trainer = Trainer(own, TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True))
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="unread"):
        trainer._load_from_checkpoint(str(folder / "checkpoint-2"), other)
    assert (tiedquiet.check(own).ok, tiedquiet.check(other).ok) == (True, False)
    with tiedquiet.enable("repair"):
        trainer._load_from_checkpoint(str(folder / "checkpoint-2"), model=other)
    assert not differing(own, before)
    assert not differing(other, truth)


def test_lists_without_a_folder(runs: Any, printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in the current one is no checkpoint of theirs."""
    folder = runs(llava)
    model = LlavaForConditionalGeneration.from_pretrained(folder / "base")
    before = state(model)
    trainer = Trainer(model, TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True))
    monkeypatch.chdir(folder / "checkpoint-2")
    with tiedquiet.enable("repair"):
        tensors = load_file(folder / "checkpoint-2" / "model.safetensors")
        trainer._issue_warnings_after_load(model.load_state_dict(tensors, strict=False))
    assert not differing(model, before)
    assert not tiedquiet.check(model).ok
    tied = llama()
    trainer = Trainer(tied, TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True))
    tensors = {key: value for key, value in tied.state_dict().items() if key != "lm_head.weight"}
    trainer._issue_warnings_after_load(tied.load_state_dict(tensors, strict=False))
    assert "from the Trainer's checkpoint: reported missing but tied" in printed.confirmed[-1]


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


@pytest.mark.parametrize("kind", [SaysNothing, Filters])
@pytest.mark.parametrize("build", [llava, mixtral])
def test_what_an_override_that_says_nothing_leaves_unread(build: Any, kind: Any, runs: Any, printed: Printed) -> None:
    folder = runs(build)
    truth = right(build, folder / "checkpoint-2")
    printed.records.clear()
    model = resumed(kind, folder, build=build)
    proof = tiedquiet.check(model)
    unread = {f.key for f in proof.findings if f.verdict is Verdict.UNREAD}
    assert unread == {key for key in truth if LOSSY[build](key)}
    assert not proof.ok
    assert f": {len(unread)} unread; nothing else is known about its load" in str(proof)
    (line,) = printed.loud
    assert f"unread, {len(unread)} of {len(truth)} tensors were NOT read" in line
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="unread"):
        resumed(kind, folder, build=build)
    printed.records.clear()
    with tiedquiet.enable("repair"):
        model = resumed(kind, folder, build=build)
    assert differing(model, truth) == set()
    assert not model._load_state_dict_post_hooks
    proof = tiedquiet.check(model)
    assert [f.verdict for f in proof.findings] == [Verdict.UNPROVEN], "what else that code did was not seen"
    assert not printed.loud


class ReadsAHeadLater(SaysNothing):
    """Reads one more tensor, by itself."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        (model or self.model).load_state_dict({"lm_head.weight": torch.ones(64, 32)}, strict=False)


def test_what_is_read_later_takes_nothing_of_it_back(runs: Any) -> None:
    unread = {f.key for f in tiedquiet.check(resumed(ReadsAHeadLater, runs(mixtral), build=mixtral)).findings[1:]}
    assert unread == {key for key in right(mixtral, runs(mixtral) / "checkpoint-2") if LOSSY[mixtral](key)}


class Decodes(Trainer):
    """Reads codes by itself, each with its scale."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        tensors = load_file(Path(resume_from_checkpoint, "model.safetensors"))
        for name in [name for name in tensors if name.endswith("_scale")]:
            code = name.removesuffix("_scale")
            tensors[code] = tensors[code].float() * tensors.pop(name)
        (model or self.model).load_state_dict(tensors, strict=False)


def test_codes_that_an_override_decodes(runs: Any, tmp_path: Path, printed: Printed) -> None:
    up = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(runs(llama) / "checkpoint-2" / "model.safetensors")
    codes = {up: tensors[up].to(torch.float8_e4m3fn), f"{up}_scale": torch.full((1,), 0.5)}
    save_file({**tensors, **codes}, tmp_path / "model.safetensors", {"format": "pt"})
    model = type(llama()).from_pretrained(runs(llama) / "base")
    printed.records.clear()
    with tiedquiet.enable("strict"):
        Decodes(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))._load_from_checkpoint(
            str(tmp_path)
        )
    assert torch.equal(model.get_parameter(up), codes[up].float() / 2)
    assert not printed.loud


class ReadsAnAverage(Trainer):
    """Reads another file of the same names, beside the one that a Trainer reads."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        tensors = load_file(Path(resume_from_checkpoint, "model.safetensors"))
        averaged = {name: tensor / 2 for name, tensor in tensors.items()}
        (model or self.model).load_state_dict(averaged, strict=False)


class TellsOfAnAverage(Trainer):
    """The same, and has transformers print what was missing."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        tensors = load_file(Path(resume_from_checkpoint, "model.safetensors"))
        averaged = {name: tensor / 2 for name, tensor in tensors.items()}
        self._issue_warnings_after_load((model or self.model).load_state_dict(averaged, strict=False))


class ReadsMore(Trainer):
    """Reads a tensor of its own as well, which the checkpoint's file does not have."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        tensors = {**load_file(Path(resume_from_checkpoint, "model.safetensors")), "more": torch.zeros(1)}
        (model or self.model).load_state_dict(tensors, strict=False)


@pytest.mark.parametrize("kind", [ReadsAnAverage, TellsOfAnAverage, ReadsMore])
def test_repair_puts_nothing_beside_what_came_from_another_file(kind: Any, runs: Any, printed: Printed) -> None:
    folder = runs(mixtral)
    before = MixtralForCausalLM.from_pretrained(folder / "base").state_dict()
    printed.records.clear()
    with tiedquiet.enable("repair"):
        model = resumed(kind, folder, build=mixtral)
    left = [key for key in before if LOSSY[mixtral](key)]
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in left)
    assert tiedquiet.check(model).unread == len(left)
    assert "Make the code that read it rename" in printed.loud[0]


def test_an_average_that_has_all_is_not_what_the_checkpoint_s_file_holds(runs: Any, printed: Printed) -> None:
    model = resumed(TellsOfAnAverage, runs(llama), build=llama)
    assert [finding.verdict for finding in tiedquiet.check(model).findings] == [Verdict.UNPROVEN]
    assert any("missing keys" in line and "lm_head.weight" in line for line in printed.of("transformers.trainer"))


@pytest.mark.parametrize("kind", [RenamesItself, CopiesTheRest])
def test_what_an_override_reads_in_two_steps_is_read(kind: Any, runs: Any, printed: Printed) -> None:
    folder = runs(mixtral)
    truth = right(mixtral, folder / "checkpoint-2")
    printed.records.clear()
    with tiedquiet.enable("strict"):
        model = resumed(kind, folder, build=mixtral)
    assert differing(model, truth) == set()
    assert [f.verdict for f in tiedquiet.check(model).findings] == [Verdict.UNPROVEN]
    assert not printed.loud


class HasATeacher(SaysNothing):
    """Resumes another Trainer's model first."""

    folder: Path
    teacher: Any = None

    def resume_teacher(self) -> None:
        Trainer(self.teacher, self.args)._load_from_checkpoint(str(self.folder / "checkpoint-2"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.resume_teacher()
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def test_a_resume_inside_a_resume_is_one_of_its_own(runs: Any, printed: Printed) -> None:
    HasATeacher.folder, truth = runs(llama), right(mixtral, runs(mixtral) / "checkpoint-2")
    HasATeacher.teacher = type(llama()).from_pretrained(runs(llama) / "base")
    printed.records.clear()
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match=r"MixtralForCausalLM from .*: unread, 6 of 21"):
        resumed(HasATeacher, runs(mixtral), build=mixtral)
    assert tiedquiet.check(HasATeacher.teacher).ok
    with tiedquiet.enable("repair"):
        assert not differing(resumed(HasATeacher, runs(mixtral), build=mixtral), truth)
    assert not printed.loud


class HasATeacherThen(HasATeacher):  # and tells what it has read itself after that
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        read = self.model.load_state_dict(load_file(Path(resume_from_checkpoint, "model.safetensors")), strict=False)
        self.resume_teacher()
        self._issue_warnings_after_load(read)


def test_a_resume_goes_on_after_one_inside_it(runs: Any) -> None:
    HasATeacherThen.folder = runs(llama)
    HasATeacherThen.teacher = type(llama()).from_pretrained(runs(llama) / "base")
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match=r"MixtralForCausalLM from .*: unread, 6 of 21"):
        resumed(HasATeacherThen, runs(mixtral), build=mixtral)


class KeepsACopy(Trainer):
    """Keeps the model as it was resumed, for an average over time, and a file of it."""

    kept: Any = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        type(self).kept = copy.deepcopy(self.model), pickle.dumps(self.model)


def test_a_copy_that_is_made_in_a_resume_has_nothing_of_ours(runs: Any) -> None:
    model = resumed(KeepsACopy, runs(llama), build=llama)
    copied, pickled = KeepsACopy.kept
    assert not any("tiedquiet" in f"{arg}" for _, arg, _ in pickletools.genops(pickled) if arg != "_tiedquiet_record")
    for other in (copied, pickle.loads(pickled)):
        assert not other.load_state_dict(model.state_dict()).missing_keys
    assert not model._load_state_dict_post_hooks

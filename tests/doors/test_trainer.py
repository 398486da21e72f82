"""What a Trainer reads of a checkpoint when it resumes, and when it takes its best model back.

Truth is what `from_pretrained` gives of the same folder. Nothing of the Trainer is mocked.
"""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaForCausalLM,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.training import (
    DATA,
    EVALUATED,
    LOSSY,
    ROOT,
    differing,
    llama,
    llava,
    mixtral,
    resumed,
    right,
    trainer_of,
)
from tiedquiet import LoadError, Verdict


@pytest.mark.parametrize("build", LOSSY)
def test_what_a_resume_does_not_read_is_told_by_name(build: Any, runs: Any, printed: Printed) -> None:
    folder = runs(build)
    printed.records.clear()
    model = resumed(build, folder)
    proof = tiedquiet.check(model)
    unread = {f.key for f in proof.findings if f.verdict is Verdict.UNREAD}
    assert unread == {key for key in model.state_dict() if LOSSY[build](key)}
    assert unread >= differing(model, right(build, folder / "checkpoint-2")) > set()
    assert not proof.ok
    assert (proof.unread, proof.stored + proof.unread, proof.total) == (
        len(unread),
        proof.total,
        len(model.state_dict()),
    )
    names = load_file(folder / "checkpoint-2" / "model.safetensors").keys()
    assert all(f.source in names for f in proof.findings if f.verdict is Verdict.UNREAD)
    (line,) = printed.loud
    assert f"{len(unread)} of {proof.total} tensors were NOT read" in line
    assert "Trainer reads a checkpoint without the renaming" in line
    listed = " ".join(printed.of("transformers.trainer"))
    assert "missing keys" in listed, "its own lines are true here, and stay"
    assert "unexpected keys" in listed


@pytest.mark.parametrize("build", LOSSY)
def test_strict_stops_the_resume(build: Any, runs: Any) -> None:
    folder = runs(build)
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="unread") as caught:
        resumed(build, folder)
    assert all(finding.verdict is Verdict.UNREAD for finding in caught.value.findings)


@pytest.mark.parametrize("build", LOSSY)
def test_repair_reads_it_to_the_bit_into_the_same_parameters(build: Any, runs: Any, printed: Printed) -> None:
    folder = runs(build)
    printed.records.clear()
    model = type(build()).from_pretrained(folder / "base")
    before = dict(model.named_parameters())
    with tiedquiet.enable("repair"):
        trainer_of(model, folder)._load_from_checkpoint(str(folder / "checkpoint-2"))
    assert differing(model, right(build, folder / "checkpoint-2")) == set()
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items()), "the optimizer holds them"
    proof = tiedquiet.check(model)
    assert (proof.ok, proof.stored) == (True, proof.total)
    assert "read by TIEDQUIET=repair, because Trainer" in printed.confirmed[0]
    assert not printed.of("transformers.trainer")


@pytest.mark.parametrize("mode", ["on", "repair", "strict"])
@pytest.mark.parametrize("build", LOSSY)
def test_a_model_made_from_the_checkpoint_itself_holds_it(build: Any, mode: Any, runs: Any, printed: Printed) -> None:
    """The cure that the line names: nothing was lost then, although nothing was read."""
    folder = runs(build)
    model = type(build()).from_pretrained(folder / "checkpoint-2")
    printed.records.clear()
    with tiedquiet.enable(mode):
        trainer_of(model, folder)._load_from_checkpoint(str(folder / "checkpoint-2"))
    assert differing(model, right(build, folder / "checkpoint-2")) == set()
    proof = tiedquiet.check(model)
    assert (proof.ok, proof.stored) == (True, proof.total)
    assert not printed.loud
    assert not printed.of("transformers.trainer"), "neither of its lists is true here"
    (line,) = printed.of("tiedquiet", logging.INFO)
    assert "reported missing, but the model already holds what the checkpoint stores: " in line


@pytest.mark.parametrize("build", LOSSY)
def test_one_element_that_differs_is_not_held(build: Any, runs: Any) -> None:
    folder = runs(build)
    for which in (0, -1):
        model = type(build()).from_pretrained(folder / "checkpoint-2")
        key = [key for key in model.state_dict() if LOSSY[build](key)][which]
        with torch.no_grad():
            model.state_dict()[key].view(-1)[-1] += 1
        trainer_of(model, folder)._load_from_checkpoint(str(folder / "checkpoint-2"))
        found = {finding.key for finding in tiedquiet.check(model).findings}
        assert found == {key for key in model.state_dict() if LOSSY[build](key)}
        with tiedquiet.enable("repair"):
            trainer_of(model, folder)._load_from_checkpoint(str(folder / "checkpoint-2"))
        assert differing(model, right(build, folder / "checkpoint-2")) == set()


@pytest.mark.parametrize("build", [llama, *LOSSY])
def test_a_whole_run_resumed_twice_and_its_best_model(build: Any, runs: Any, tmp_path: Path) -> None:
    """Loss goes on where it was; and the checkpoint of a resumed run can be resumed."""
    folder = runs(build)
    os.symlink(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    with tiedquiet.enable("repair"):
        for steps, before in ((4, 2), (6, 4)):
            model = type(build()).from_pretrained(folder / "base")
            trainer = trainer_of(model, tmp_path, steps, load_best_model_at_end=True, **EVALUATED)
            trainer.eval_dataset = DATA
            trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{before}"))
            best = Path(str(trainer.state.best_model_checkpoint))
            assert best.is_dir()
            assert differing(model, right(build, best)) == set()
            assert tiedquiet.check(model).ok


def test_what_to_do_about_the_best_model_of_a_run_that_is_over(runs: Any, printed: Printed) -> None:
    """No Trainer needs to be given anything: the checkpoint is read as it should be."""
    folder = runs(llava)
    trainer = trainer_of(type(llava()).from_pretrained(folder / "base"), folder)
    trainer.state.best_model_checkpoint = str(folder / "checkpoint-2")
    trainer._load_best_model()
    (line,) = printed.loud
    assert line.endswith("Set TIEDQUIET=repair to read them, or load this checkpoint with from_pretrained")
    model = type(llava()).from_pretrained(folder / "checkpoint-2")
    assert differing(model, right(llava, folder / "checkpoint-2")) == set()


def test_a_clean_resume_leaves_its_record(runs: Any, printed: Printed) -> None:
    folder = runs(llama)
    printed.records.clear()
    model = resumed(llama, folder)
    proof = tiedquiet.check(model)
    assert proof.ok
    assert (proof.stored, proof.total) == (len(model.state_dict()) - 1, len(model.state_dict()))
    assert [f.verdict for f in proof.findings] == [Verdict.TIED]
    assert not printed.of("transformers.trainer")
    assert not printed.loud


def test_a_resume_in_another_type_keeps_the_model_s(runs: Any) -> None:
    folder = runs(mixtral)
    truth = right(mixtral, folder / "checkpoint-2")
    with tiedquiet.enable("repair"):
        model = MixtralForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        trainer_of(model, folder)._load_from_checkpoint(str(folder / "checkpoint-2"))
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    assert differing(model, {key: value.bfloat16() for key, value in truth.items()}) == set()


def test_a_resume_that_fails_keeps_its_own_error(runs: Any, tmp_path: Path) -> None:
    folder = runs(llama)
    tensors = load_file(folder / "checkpoint-2" / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(5)
    (tmp_path / "c").mkdir()
    save_file(tensors, tmp_path / "c" / "model.safetensors", {"format": "pt"})
    with tiedquiet.enable("strict"), pytest.raises(RuntimeError, match=r"size mismatch for model\.norm\.weight"):
        resumed(llama, folder, tmp_path / "c")
    with tiedquiet.enable("strict"), pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        resumed(llama, folder, tmp_path)


class _ReadsByItself(Trainer):
    """Says nothing of what was missing, so nothing is known of it."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        (model or self.model).load_state_dict(load_file(Path(resume_from_checkpoint, "model.safetensors")), False)


def test_what_another_library_reads_is_unproven(runs: Any, printed: Printed) -> None:
    folder = runs(llama)
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    arguments = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)
    _ReadsByItself(model, arguments)._load_from_checkpoint(str(folder / "checkpoint-2"))
    proof = tiedquiet.check(model)
    assert [(f.key, f.verdict) for f in proof.findings] == [("", Verdict.UNPROVEN)]
    assert (
        "checkpoint-2 was read by _ReadsByItself's own code, which tiedquiet does not inspect" in proof.findings[0].why
    )
    assert "not sound" not in str(proof), "that is not known either"
    assert any("does not inspect" in line for line in printed.of("tiedquiet"))


class _Engine:
    """What of DeepSpeed's engine the Trainer uses to read a checkpoint."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def load_checkpoint(self, path: str, **_: Any) -> tuple[str, None]:
        return path, None


def test_what_deepspeed_reads_is_unproven(runs: Any, tmp_path: Path) -> None:
    from transformers import trainer as module

    model = LlamaForCausalLM.from_pretrained(runs(llama) / "base")
    (tmp_path / "global_step2").mkdir()
    with tiedquiet.enable("off"):
        module.deepspeed_load_checkpoint(_Engine(model), str(tmp_path))
    assert tiedquiet.check(model).ok
    module.deepspeed_load_checkpoint(_Engine(model), str(tmp_path))
    (finding,) = tiedquiet.check(model).findings
    assert (finding.verdict, "was read by DeepSpeed" in finding.why) == (Verdict.UNPROVEN, True)
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        module.deepspeed_load_checkpoint(_Engine(model), str(tmp_path / "nowhere"))


def test_what_deepspeed_reads_into_adapters_is_unproven_too(runs: Any, tmp_path: Path) -> None:
    from transformers import trainer as module

    peft = pytest.importorskip("peft")
    base = LlamaForCausalLM.from_pretrained(runs(llama) / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    (tmp_path / "global_step2").mkdir()
    module.deepspeed_load_checkpoint(_Engine(model), str(tmp_path))
    for one in (model, base):
        (finding,) = tiedquiet.check(one).findings
        assert (finding.verdict, "was read by DeepSpeed" in finding.why) == (Verdict.UNPROVEN, True)
    by_fsdp = _ReadsByItself(base, TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True))
    by_fsdp.is_fsdp_enabled = True
    by_fsdp._load_from_checkpoint(str(runs(llama) / "checkpoint-2"))
    assert "was read by FSDP" in tiedquiet.check(base).findings[0].why


class _ReadsByADoor(Trainer):
    """Makes the best model anew."""

    def _load_best_model(self) -> None:
        self.model = LlamaForCausalLM.from_pretrained(self.state.best_model_checkpoint)


def test_what_another_door_has_seen_stays_known(runs: Any, tmp_path: Path) -> None:
    folder = runs(llama)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    for kind, best, is_known in ((_ReadsByADoor, folder / "checkpoint-2", True), (Trainer, tmp_path, False)):
        run = kind(LlamaForCausalLM.from_pretrained(folder / "base"), arguments)
        run.state.best_model_checkpoint = str(best)
        run._load_best_model()
        proof = tiedquiet.check(run.model)
        assert proof.ok is is_known
    assert "has no file that Trainer reads" in proof.findings[0].why


def test_a_record_that_cannot_be_left_does_not_stop_the_run(
    runs: Any, printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs(llama)
    model = LlamaForCausalLM.from_pretrained(folder / "base")

    def breaks(*_: Any) -> None:
        raise KeyError("injected")

    monkeypatch.setattr("tiedquiet.doors.trainer.record.leave", breaks)
    arguments = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)
    _ReadsByItself(model, arguments)._load_from_checkpoint(str(folder / "checkpoint-2"))
    assert any("goes on without it: KeyError" in line for line in printed.loud)


def test_off_is_off(runs: Any, printed: Printed) -> None:
    folder = runs(mixtral)
    printed.records.clear()
    with tiedquiet.enable("off"):
        model = resumed(mixtral, folder)
    assert not printed.of("tiedquiet")
    assert len(differing(model, right(mixtral, folder / "checkpoint-2"))) == 6


PROGRAM = """
import os, sys, torch, tiedquiet
from tests.doors.training import differing, mixtral, right, trainer_of
from pathlib import Path
from transformers import MixtralForCausalLM
folder = Path(sys.argv[1])
model = MixtralForCausalLM.from_pretrained(folder / "base")
trainer = trainer_of(model, folder / "ddp", 3, save_strategy="no", ddp_backend="gloo")
seen = {}
step = trainer.training_step
def first(*args, **kwargs):
    seen.setdefault("differing", len(differing(model, truth)))
    seen.setdefault("ddp", type(trainer.model_wrapped).__name__)
    return step(*args, **kwargs)
truth = right(mixtral, folder / "checkpoint-2")
trainer.training_step = first
trainer.train(resume_from_checkpoint=str(folder / "without"))
print(f"rank {trainer.args.process_index}: {seen} {trainer.state.global_step}")
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort a process that takes itself down, whatever it did
"""


@pytest.mark.slow
def test_two_processes(runs: Any, tmp_path: Path) -> None:
    folder = runs(mixtral)
    (tmp_path / "program.py").write_text(PROGRAM)
    # Without the optimizer, which some releases cannot read on two CPU processes.
    shutil.copytree(folder / "checkpoint-2", folder / "without", ignore=lambda *_: {"optimizer.pt", "scheduler.pt"})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(tmp_path / "program.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TIEDQUIET": "repair"}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {f"rank {n}: {{'differing': 0, 'ddp': 'DistributedDataParallel'}} 3" for n in (0, 1)}
    assert all(line in done.stdout for line in expected), done.stdout
    assert sum("read by TIEDQUIET=repair" in line for line in done.stderr.splitlines()) == 1, "rank 0 alone speaks"

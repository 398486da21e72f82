"""Student and critic as adapters of one frozen base."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UniPCMultistepScheduler, WanPipeline
from safetensors.torch import load_file

from tests.distill.running import IN_TWO_PROCESSES, SHORT, experts, run, same
from tiedquiet.distill import evaluate, plan, train
from tiedquiet.distill.checkpoint import checkpoints
from tiedquiet.distill.data import Data
from tiedquiet.distill.lora import FILE, Adapter
from tiedquiet.distill.options import TINY_WAN, parse
from tiedquiet.distill.pipeline import Teacher, load_student
from tiedquiet.distill.train import __doc__ as DOC
from tiedquiet.distill.train import main

PROMPT = "a red circle moving left"
LORA = ["--lora_rank", "4", "--learning_rate", "1e-2", "--matching_learning_rate", "1e-3", "--lr_warmup_steps", "0"]


def adapters(out: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted((out / "student").glob("*.safetensors"))]


def test_an_adapter_is_a_model_of_its_own() -> None:
    base = Teacher(str(TINY_WAN)).expert(experts()[0], torch.float32).eval().requires_grad_(False)
    whole = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    inputs = torch.randn(2, 16, 2, 8, 8), torch.tensor([900.0, 950.0]), torch.randn(2, 16, 64)
    with torch.no_grad():
        before = base(*inputs, return_dict=False)[0]
    student, critic = (Adapter(base, name).add(4, seed) for seed, name in enumerate(("student", "critic")))
    bare = Adapter(base, None)
    state = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    # Gradients that were asked for before another adapter's turn are not lost by it.
    loss = student(*inputs, return_dict=False)[0].square().mean()
    with torch.no_grad():
        assert torch.equal(bare(*inputs, return_dict=False)[0], before)
        torch.testing.assert_close(critic(*inputs, return_dict=False)[0], before)  # both begin as the base
    student.activate()
    loss.backward()
    moved = [p for p in student.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(moved) == 6 * 10  # of each block ten B, as A moves only when B is not zero
    assert all(p.grad is None for p in critic.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05)
        assert not torch.allclose(student(*inputs, return_dict=False)[0], before, atol=1e-3)
        assert torch.equal(bare(*inputs, return_dict=False)[0], before)
    assert same(critic.state_dict(), state)
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items() if "lora" not in name}
    assert same(kept, whole)


@pytest.mark.slow
def test_adapters_are_resumed_to_the_bit_and_plain_wan_pipeline_loads_them(
    tmp_path: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [*SHORT, *prompts, *LORA, "--distribution_matching_steps", "3", "--use_ema", "--gradient_checkpointing"]
    common += ["--validation_prompts", PROMPT, "--validation_steps", "3"]
    assert main([*common, "--output_dir", str(tmp_path / "whole")]) == 0
    assert len(list((tmp_path / "whole/validation").iterdir())) == 4
    arms = json.loads((tmp_path / "whole/metrics.json").read_text())["arms"]
    assert arms["segments, 2 steps"]["psnr"] != arms["student, 2 steps"]["psnr"] != arms["untrained, 2 steps"]["psnr"]
    assert len(adapters(tmp_path / "whole")) == 2

    # Stopped after two updates of the last stage.
    broken = ["--checkpointing_steps", "2", "--output_dir", str(tmp_path / "broken")]
    pause = train.save_checkpoint

    def stop(*args: object) -> None:
        pause(*args)  # type: ignore[arg-type]
        if "transformer_2/matching" in str(args[1]):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            main([*common, *broken])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert checkpoints(tmp_path / "broken/checkpoints/transformer_2/matching")
    assert main([*common, *broken, "--resume_from_checkpoint", "latest"]) == 0
    for one, two in zip(adapters(tmp_path / "whole"), adapters(tmp_path / "broken"), strict=True):
        assert same(one, two)

    pipe = WanPipeline.from_pretrained(TINY_WAN)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = UniPCMultistepScheduler.from_pretrained(tmp_path / "whole/student/scheduler")
    call = {"height": 64, "width": 64, "num_frames": 5, "max_sequence_length": 16, "guidance_scale": 1.0}
    call |= {"num_inference_steps": 2, "output_type": "latent", "latents": torch.randn(1, 16, 2, 8, 8)}
    bare = pipe(PROMPT, **call).frames
    inputs = torch.randn(1, 16, 2, 8, 8), torch.tensor([500.0]), torch.randn(1, 16, 64)
    untouched = pipe.transformer_2(*inputs, return_dict=False)[0]
    pipe.load_lora_weights(tmp_path / "whole/student")
    second = "transformer_2_lora_weights.safetensors"
    pipe.load_lora_weights(tmp_path / "whole/student", weight_name=second, load_into_transformer_2=True)
    assert (pipe(PROMPT, **call).frames - bare).norm() > 0.01 * bare.norm()
    assert (pipe.transformer_2(*inputs, return_dict=False)[0] - untouched).norm() > 1e-3 * untouched.norm()
    card = (tmp_path / "whole/student/README.md").read_text()
    assert "pipe.load_lora_weights" in card
    assert "transformer_2_lora_weights.safetensors" in card


@pytest.mark.slow
def test_adapters_learn_in_two_processes(tmp_path: Path, prompts: list[str]) -> None:
    common = [*SHORT, *prompts, *LORA, "--expert", "high", "--checkpointing_steps", "2", "--output_dir"]
    done = run(*common, tmp_path / "two", launch=IN_TWO_PROCESSES)
    assert done.returncode == 0, done.stderr
    # What both processes learnt is what one does that takes both batches for one.
    alone = run(*common, tmp_path / "one", "--gradient_accumulation_steps", "2")
    assert alone.returncode == 0, alone.stderr
    (one,), (two,) = adapters(tmp_path / "one"), adapters(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_matching_alone_has_an_adapter_too(tmp_path: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.Judge, "report", lambda self, experts: {})
    alone = ["--max_train_steps", "0", "--segment_weight", "0", "--expert", "high"]
    assert main([*SHORT, *prompts, *LORA, *alone, "--output_dir", str(tmp_path / "out")]) == 0
    (state,) = adapters(tmp_path / "out")
    assert any(tensor.abs().sum() > 0 for name, tensor in state.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--student_blocks", "3"], "adapters sit on all the teacher's blocks"),
        (["--student_steps", "0", "--student_blocks", "6", "--distribution_matching_steps", "0"], "of few steps"),
    ],
)
def test_adapters_do_not_go_with(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--lora_rank", "4", *flags, "--output_dir", str(tmp_path / "out")])
    assert words in capsys.readouterr().err


def test_the_memory_of_adapters() -> None:
    """Rank 4 on ten products of each of six blocks: eight 96 x 96 and two 96 x 192."""
    config = Teacher(str(TINY_WAN)).transformer
    adapter = 6 * 4 * (8 * (96 + 96) + 2 * (96 + 192))
    args = parse(DOC, ["--lora_rank", "4", "--mixed_precision", "bf16"])
    args.student_blocks = 6
    # Student and critic lie on one teacher, with the gradients of one of them; nobody wraps them under DDP.
    assert plan.memory(args, config, processes=2) == 2 * 794_848 + (12 + 12 + 4) * adapter
    # The first expert's student, which takes the second one's first steps, has a teacher of its own.
    assert plan.memory(args, config, experts=2) == 2 * 2 * 794_848 + (12 + 12 + 4) * adapter
    args.distribution_matching_steps = 0
    assert plan.memory(args, config) == 2 * 794_848 + 16 * adapter


def test_the_disk_of_adapters(tmp_path: Path) -> None:
    """No part of the teacher is copied; a stage's folder, the student's and one checkpoint with Adam's moments."""
    teacher = Teacher(str(TINY_WAN))
    args = parse(DOC, ["--lora_rank", "4", "--student_dtype", "float32", "--output_dir", str(tmp_path)])
    args.student_blocks = 6
    data = Data(args, ["a"], [])
    data.look(teacher, torch.float32)
    four = 4 * plan.adapter(args, teacher.transformer)
    names = ["transformer", "transformer_2"]
    assert plan.space(args, teacher, names, data)["--output_dir"] == (tmp_path, 2 * (3 * four + 3 * 2 * four))
    args.distribution_matching_steps = 0
    assert plan.space(args, teacher, names, data)["--output_dir"] == (tmp_path, 2 * (2 * four + 3 * four))


def test_a_student_is_loaded_as_it_was_left(tmp_path: Path) -> None:
    teacher, expert = Teacher(str(TINY_WAN)), experts()[1]
    base = teacher.expert(expert, torch.float32).eval().requires_grad_(False)
    adapter = Adapter(base, "student").add(4, 0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.02)
    adapter.save(tmp_path / "student")
    inputs = torch.randn(1, 16, 2, 8, 8), torch.tensor([500.0]), torch.randn(1, 16, 64)
    loaded = load_student(teacher, expert, tmp_path, torch.float32).eval()
    with torch.no_grad():
        ours = adapter(*inputs, return_dict=False)[0]
        torch.testing.assert_close(loaded(*inputs, return_dict=False)[0], ours)
    again = Adapter(teacher.expert(expert, torch.float32), "student").add(4, 1, tmp_path / "student" / FILE)
    assert same(again.state_dict(), adapter.state_dict())

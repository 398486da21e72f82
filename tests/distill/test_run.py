"""A whole run: what it leaves, and that plain diffusers draws the same."""

import json
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distill.running import SHORT, VELOCITY, experts, run, same, weights
from tiedquiet.distill import evaluate, pipeline
from tiedquiet.distill.checkpoint import checkpoints
from tiedquiet.distill.options import TINY_WAN
from tiedquiet.distill.pipeline import Teacher
from tiedquiet.distill.tiny.clips import PROMPTS
from tiedquiet.distill.train import main


@pytest.mark.slow
def test_a_run_leaves_a_pipeline_pictures_and_measurements(
    tmp_path: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    own = ["--output_dir", str(out), "--cache_dir", str(out / "cache")]
    done = run(
        *SHORT, *prompts, *VELOCITY, *own, "--show_broken_tie", "--use_ema", "--report_to", "tensorboard",
        "--validation_steps", "2", "--validation_prompts", "a green triangle moving down", "--guidance_scale", "2",
        "--gradient_accumulation_steps", "2", "--gradient_checkpointing", "--checkpointing_steps", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "encoder.embed_tokens.weight is shared.weight: tied" in done.stdout
    assert "encoder.embed_tokens.weight is shared.weight: untied" in done.stdout
    assert "values are NOT from the checkpoint" in done.stderr

    arms = json.loads((out / "metrics.json").read_text())["arms"]
    assert list(arms) == ["teacher, 4 steps", "untrained, 4 steps", "student, 4 steps", "tie broken", "repaired"]
    assert arms["repaired"]["adherence"] == arms["teacher, 4 steps"]["adherence"] > arms["tie broken"]["adherence"]
    assert [arm["block_passes"] for arm in arms.values()] == [48, 12, 12, 48, 48]
    assert all(arm["seconds"] > 0 and arm["vae_seconds"] > 0 for arm in arms.values())
    for name in arms:
        assert f"| {name}" in done.stdout
    # What the pages show is what is printed.
    root = Path(__file__).parents[2]
    pages = (root / "docs/example.md").read_text() + (root / "docs/distill.md").read_text()
    shown = [" ".join(line.split()) for line in pages.splitlines()]
    printed = [" ".join(line.split()) for line in done.stdout.splitlines()]
    told = [line for line in printed if line.startswith("text encoder: ") or "| adherence |" in line]
    assert len(told) == 4
    assert set(told) <= set(shown)
    assert json.loads((out / "args.json").read_text())["student_blocks"] == 3
    for picture in (
        "loss.png",
        "samples.png",
        "samples.gif",
        "broken_tie.png",
        "validation/transformer-velocity-2.gif",
    ):
        assert iio.imread(out / picture).std() > 1, picture
    (events,) = {path.parent for path in (out / "logs").rglob("events*") if path.stat().st_size > 10_000}
    tracked = EventAccumulator(str(events), size_guidance={"images": 0, "scalars": 0}).Reload()
    films = {tag: tracked.Images(tag) for tag in tracked.Tags()["images"]}
    assert {tag: [film.step for film in its] for tag, its in films.items()} == {
        "transformer/velocity": [2],
        "transformer_2/velocity": [3 + 2],  # it counts on
    }
    film = out / "validation/transformer-velocity-2.gif"
    assert films["transformer/velocity"][0].encoded_image_string == film.read_bytes()
    assert [event.step for event in tracked.Scalars("transformer_2/velocity/total")] == [4, 5, 6]
    kept = [path.name for path in checkpoints(out / "checkpoints/transformer_2/velocity")]
    assert kept == ["checkpoint-2", "checkpoint-3"]  # as asked for, and the last
    assert not list(out.rglob(".part*"))

    pipe = WanPipeline.from_pretrained(out / "student")
    assert [len(expert.blocks) for expert in (pipe.transformer, pipe.transformer_2)] == [3, 3]
    assert pipe.text_encoder.encoder.embed_tokens.weight is pipe.text_encoder.shared.weight
    assert json.loads((out / "student/text_encoder/config.json").read_text())["tie_word_embeddings"] is True
    clip = pipe(PROMPTS[0], height=64, width=64, num_frames=5, num_inference_steps=1, guidance_scale=1).frames
    assert clip.shape == (1, 5, 64, 64, 3)
    # A student that learnt is neither its beginning nor the same in both experts.
    begun = pipeline.new_student(Teacher(str(TINY_WAN)).expert(experts()[0], torch.float32), 3, torch.float32)
    assert not same(weights(out), begun.state_dict())
    assert not same(weights(out), weights(out, "transformer_2"))

    # Nothing is made twice, and nothing is used that was made in another way.
    latents = sorted((out / "cache").glob("latents-*/*.safetensors"))
    times = [path.stat().st_mtime_ns for path in latents]
    shared = [*SHORT, *prompts, *VELOCITY, "--cache_dir", str(out / "cache"), "--expert", "low", "--output_dir"]
    capsys.readouterr()
    assert main([*shared, str(tmp_path / "again")]) == 0
    assert "latents from the teacher" not in capsys.readouterr().err
    assert [path.stat().st_mtime_ns for path in latents] == times
    assert len(list((out / "cache").glob("latents-*"))) == 1
    assert same(weights(tmp_path / "again"), load_file(TINY_WAN / "transformer/diffusion_pytorch_model.safetensors"))
    with monkeypatch.context() as patched:
        patched.setattr(evaluate.Judge, "report", lambda self, experts: {})
        assert main([*shared, str(tmp_path / "other"), "--num_frames", "9"]) == 0
    assert len(list((out / "cache").glob("latents-*"))) == 2


@pytest.mark.slow
def test_a_student_of_few_steps_is_what_plain_wan_pipeline_draws(tmp_path: Path, prompts: list[str]) -> None:
    out = tmp_path / "out"
    size_of_student = ["--student_steps", "4", "--student_blocks", "3"]
    assert main([*SHORT, *prompts, *size_of_student, "--output_dir", str(out), "--num_inference_steps", "8"]) == 0
    arms = json.loads((out / "metrics.json").read_text())["arms"]
    assert list(arms) == [
        "teacher, 8 steps", "teacher, 4 steps", "untrained, 4 steps", "segments, 4 steps", "student, 4 steps",
    ]  # fmt: skip
    assert [arm["block_passes"] for arm in arms.values()] == [96, 48, 12, 12, 12]
    assert arms["segments, 4 steps"]["psnr"] != arms["student, 4 steps"]["psnr"]
    assert "psnr" not in arms["teacher, 8 steps"]
    pipe = WanPipeline.from_pretrained(out / "student")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    size = {"height": 64, "width": 64, "num_frames": 5, "max_sequence_length": 16}
    states = []

    def note(pipe: Any, step: int, timestep: torch.Tensor, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        states.append((float(timestep), kept["latents"]))
        return {}

    pipe(PROMPTS[0], **size, latents=noise, num_inference_steps=4, guidance_scale=1.0, output_type="latent",
        callback_on_step_end=note)  # fmt: skip
    # Euler by hand, at the nodes u = 1, 3/4, 1/2, 1/4 of shift 5, and each expert on its side.
    u = 0.999 * torch.arange(4, -1, -1, dtype=torch.float64) / 4 + 0.001
    sigmas = [*(5 * u / (1 + 4 * u)).tolist()[:4], 0.0]
    text = pipe.encode_prompt(PROMPTS[0], do_classifier_free_guidance=False, max_sequence_length=16)[0]
    x = noise
    for (timestep, state), sigma, after in zip(states, sigmas[:-1], sigmas[1:], strict=True):
        assert timestep == pytest.approx(1000 * sigma, abs=1.5)
        expert = pipe.transformer if timestep >= 875 else pipe.transformer_2
        with torch.no_grad():
            x = x - (sigma - after) * expert(x, torch.tensor([timestep]), text, return_dict=False)[0]
        torch.testing.assert_close(state, x, rtol=1e-2, atol=1e-2)
    card = (out / "student/README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\npipeline_tag: text-to-video\n")
    for told in (
        "max_sequence_length=16, num_inference_steps=4, guidance_scale=1.0",
        "| student, 4 steps",
        "](samples.png)",
        "student_steps: 4",
    ):
        assert told in card
    assert str(tmp_path) not in card
    assert str(TINY_WAN) not in card
    assert (out / "student/samples.png").stat().st_size == (out / "samples.png").stat().st_size


@pytest.mark.slow
def test_validation_shows_the_students_of_both_experts(
    tmp_path: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the last stage that each has finished left it; the teacher's own only before the first one."""
    shown, pipeline_of, load = list[tuple[str, ...]](), Teacher.pipeline, evaluate.load_student
    left: list[str] = []

    def note(self: Teacher, *args: Any, **students: Any) -> Any:
        if students:  # those are in training, and stay where they are
            assert students.pop("aside") is False
        shown.append((*sorted(students), *left))
        left.clear()
        return pipeline_of(self, *args, aside=False, **students)

    monkeypatch.setattr(Teacher, "pipeline", note)
    monkeypatch.setattr(evaluate, "load_student", lambda *args: (left.append(args[2].name), load(*args))[1])
    monkeypatch.setattr(evaluate.Judge, "report", lambda self, experts: {})
    argv = [*SHORT, *prompts, "--max_train_steps", "1", "--distribution_matching_steps", "1", "--use_ema"]
    argv += ["--cache_dir", str(tmp_path / "cache")]  # the first pipeline is the one that makes the paths
    argv += ["--validation_prompts", PROMPTS[0], "--validation_steps", "1", "--output_dir", str(tmp_path / "out")]
    assert main(argv) == 0
    first, second = "transformer", "transformer_2"
    assert shown[1:] == [
        (first,), (first, second, "segments"), (first, second, "segments"), (first, second, "matching"),
    ]  # fmt: skip

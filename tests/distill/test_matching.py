"""The second stage: its losses against values made by hand, and what moves in it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from safetensors.torch import load_file

from tests.distill.running import SHORT, experts, same, weights
from tiedquiet.distill import evaluate, pipeline
from tiedquiet.distill.data import Data, noise_of, sample
from tiedquiet.distill.losses import clip_of, critic_loss, distribution_matching_loss, guided, renoised
from tiedquiet.distill.options import TINY_WAN, parse
from tiedquiet.distill.pipeline import Teacher
from tiedquiet.distill.tiny.clips import PROMPTS
from tiedquiet.distill.train import Distillation, main
from tiedquiet.distill.train import __doc__ as DOC


def test_the_gradient_is_the_difference_of_the_scores() -> None:
    clip = torch.randn(2, 16, 2, 8, 8, requires_grad=True)
    real, fake = torch.randn_like(clip), torch.randn_like(clip)
    distribution_matching_loss(clip, real, fake).backward()
    assert clip.grad is not None
    for n in range(2):
        expected = (fake[n] - real[n]) / (clip[n] - real[n]).abs().mean()
        torch.testing.assert_close(clip.grad[n] * clip.numel(), expected.detach())
    # Where the critic sees what the teacher sees, there is nothing to move.
    assert distribution_matching_loss(clip, real, real).item() == 0


def test_a_clip_a_noise_level_and_a_velocity_say_the_same() -> None:
    clip, noise, sigma = torch.randn(3, 16, 2, 8, 8), torch.randn(3, 16, 2, 8, 8), torch.tensor([0.1, 0.5, 1.0])
    x = renoised(clip, sigma, noise)
    torch.testing.assert_close(x[2], noise[2])
    torch.testing.assert_close(clip_of(x, sigma, noise - clip), clip)
    assert critic_loss(noise - clip, clip, noise).item() == 0
    assert critic_loss(noise - clip + 2, clip, noise).item() == pytest.approx(4)
    assert torch.equal(guided(clip, noise, 1.0), noise + (clip - noise))
    torch.testing.assert_close(guided(clip, noise, 3.0), clip + 2 * (clip - noise))


def test_the_students_own_state_is_where_its_steps_lead() -> None:
    """As the pipeline's scheduler takes them, each expert's on its side."""
    teacher = Teacher(str(TINY_WAN))
    high, low = (teacher.expert(expert, torch.float32).eval() for expert in experts())
    nodes = pipeline.nodes(teacher.scheduler, 4)
    assert [nodes.of(expert) for expert in experts()] == [[0, 1], [2, 3]]
    one = Distillation(parse(DOC, []), low, low, experts()[1], None, nodes, high)
    x, text = torch.randn(2, 16, 2, 8, 8), torch.randn(2, 16, 64)
    scheduler, state = pipeline.few_steps(teacher.scheduler, 4), x
    scheduler.set_timesteps(4)
    for model, timestep in zip((high, high, low), scheduler.timesteps, strict=False):
        with torch.no_grad():
            velocity = model(state, timestep.expand(2), text, return_dict=False)[0]
        state = scheduler.step(velocity, timestep, state, return_dict=False)[0]
    torch.testing.assert_close(one.own_state(x, text, 0, 3), state, rtol=1e-3, atol=1e-3)
    assert torch.equal(one.own_state(x, text, 2, 2), x)


def test_the_student_learns_from_the_scores_and_the_critic_from_the_student() -> None:
    teacher = Teacher(str(TINY_WAN))
    expert = experts()[1]
    frozen = teacher.expert(expert, torch.float32).eval().requires_grad_(False)
    student, critic = (pipeline.new_student(frozen, 6, torch.float32) for _ in range(2))
    args = parse(DOC, ["--sample_guidance_scale", "1"])
    one = Distillation(args, frozen, student, expert, critic, pipeline.nodes(teacher.scheduler, 2))
    x, text, empty = torch.randn(2, 16, 2, 8, 8), torch.randn(2, 16, 64), torch.randn(2, 16, 64)
    sigma, noise = torch.tensor([0.3, 0.7]), torch.randn(2, 16, 2, 8, 8)
    # Not guided, the teacher is what the critic begins as: nothing moves.
    loss, clip = one.matching(x, 1, text, empty, sigma, noise)
    assert loss.item() < 1e-10
    assert not clip.requires_grad
    args.sample_guidance_scale = 3.0
    loss, again = one.matching(x, 1, text, empty, sigma, noise)
    assert torch.equal(clip, again)
    loss.backward()
    assert loss.item() > 1e-3
    assert all(parameter.grad is None for model in (frozen, critic) for parameter in model.parameters())
    assert sum(float(p.grad.abs().sum()) for p in student.parameters() if p.grad is not None) > 0
    student.zero_grad(set_to_none=True)
    one.criticism(clip, text, sigma, noise).backward()
    assert all(parameter.grad is None for parameter in student.parameters())
    assert sum(float(p.grad.abs().sum()) for p in critic.parameters() if p.grad is not None) > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # layer norm is not fused on CPUs in bf16
def test_matching_alone_needs_no_paths(tmp_path: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.Judge, "report", lambda self, experts: {})
    alone = ["--max_train_steps", "0", "--segment_weight", "0", "--mixed_precision", "bf16"]
    alone += [
        "--cache_dir",
        str(tmp_path / "cache"),
        "--gradient_accumulation_steps",
        "2",
        "--matching_learning_rate",
        "1e-3",
        "--lr_scheduler",
        "constant",
    ]
    out = tmp_path / "out"
    assert main([*SHORT, *prompts, *alone, "--output_dir", str(out)]) == 0
    assert not list((tmp_path / "cache").glob("paths-*/*.safetensors"))
    for expert in experts():
        begun = Teacher(str(TINY_WAN)).expert(expert, torch.bfloat16).float().state_dict()
        moved = weights(out, expert.name)
        name = "blocks.0.ffn.net.2.weight"
        assert (moved[name] - begun[name]).abs().mean() > 2e-4


@pytest.mark.slow
def test_one_expert_alone_begins_on_its_teachers_path(
    tmp_path: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[torch.Tensor] = []
    own_state = Distillation.own_state

    def note(self: Distillation, x: torch.Tensor, text: torch.Tensor, first: int, node: int) -> torch.Tensor:
        assert first == 1
        starts.append(x)
        return own_state(self, x, text, first, node)

    monkeypatch.setattr(Distillation, "own_state", note)
    monkeypatch.setattr(evaluate.Judge, "report", lambda self, experts: {})
    argv = [*SHORT, *prompts, "--cache_dir", str(tmp_path / "cache"), "--expert", "low"]
    argv += ["--segment_weight", "0", "--output_dir", str(tmp_path / "out")]
    assert main(argv) == 0
    (folder,) = (tmp_path / "cache").glob("paths-*")
    kept = torch.stack([load_file(path)["tensor"][0] for path in sorted(folder.glob("*.safetensors"))])
    assert len(starts) == 2
    for state in torch.cat(starts):
        assert (kept - state).abs().amax((1, 2, 3, 4)).min() == 0
    assert same(weights(tmp_path / "out"), load_file(TINY_WAN / "transformer/diffusion_pytorch_model.safetensors"))


def ended(pipe: Any, data: Data) -> torch.Tensor:
    """What the pipeline itself draws of the first prompt, from the seed 1, in two steps."""
    call = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0}
    noise = noise_of(1, data.form)[None]
    latents: torch.Tensor = pipe(prompt_embeds=data.text([0]), latents=noise, output_type="latent", **call).frames[0]
    return latents


def test_each_expert_of_wan_2_2_is_guided_by_its_own_scale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the teacher's paths, where it is the judge of the second stage, and in the pipeline that draws its clips."""
    args = parse(DOC, ["--sample_guidance_scale", "4", "--sample_guidance_scale_2", "2", "--cache_dir", str(tmp_path)])
    teacher, asked = Teacher(str(TINY_WAN)), list[float]()
    monkeypatch.setattr(Distillation, "guidance", lambda self, x, t, text, empty, scale: (asked.append(scale), x)[1])
    for expert in experts():
        model = teacher.expert(expert, torch.float32)
        one = Distillation(args, model, model, expert, model, pipeline.nodes(teacher.scheduler, 2))
        x, text = torch.randn(1, 16, 2, 8, 8), torch.randn(1, 16, 64)
        one.matching(x, 0, text, text, torch.tensor([0.5]), x)
    assert asked == [4, 2]

    data = Data(args, PROMPTS[:1], [])
    data.look(teacher, torch.float32)
    data.texts = [torch.randn(3, 64), torch.randn(2, 64)]
    pipe = teacher.pipeline(torch.device("cpu"), torch.float32)
    pipe.scheduler = pipeline.few_steps(teacher.scheduler, 2)
    path = sample(pipe, data, [0], [data.seeds[0]], 2, pipeline.guidance(args), 2)
    scheduler, x = pipeline.few_steps(teacher.scheduler, 2), path[:, 0]
    scheduler.set_timesteps(2)
    for expert, t, scale, reached in zip(experts(), scheduler.timesteps, (4, 2), path[0, 1:], strict=True):
        model, ends = teacher.expert(expert, torch.float32).eval(), [data.text([n]) for n in (0, 1)]
        with torch.no_grad():
            towards, away = (model(x, t.expand(1), text, return_dict=False)[0] for text in ends)
        x = scheduler.step(guided(towards, away, scale), t, x, return_dict=False)[0]
        torch.testing.assert_close(x[0], reached, rtol=1e-3, atol=1e-3)
    # A scheduler that takes more steps than it is asked for ends where the pipeline does.
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=5.0)
    assert torch.equal(sample(pipe, data, [0], [1], 2, {"guidance_scale": 1.0})[0, -1], ended(pipe, data))
    args.sample_guidance_scale_2 = 4.0
    (before, _), (after, _) = ((data.latents.folder, data.look(teacher, torch.float32)) for _ in range(2))
    assert before != after

"""The second stage: its losses against values made by hand, what moves in it, and what it needs."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import TWO
from tests.test_distill import IN_TWO_PROCESSES, SHORT, VELOCITY, copied, experts, run, same, weights
from tiedquiet.distill import evaluate, pipeline, plan, train
from tiedquiet.distill import prompts as prompts_of_ours
from tiedquiet.distill.data import Data, noise_of, read_prompts, sample
from tiedquiet.distill.losses import clip_of, critic_loss, distribution_matching_loss, guided, renoised
from tiedquiet.distill.options import TINY_WAN, parse
from tiedquiet.distill.pipeline import Teacher
from tiedquiet.distill.tiny.clips import PROMPTS
from tiedquiet.distill.train import Distillation, main
from tiedquiet.distill.train import __doc__ as DOC

pytestmark = pytest.mark.usefixtures("own_run")


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
    alone += ["--gradient_accumulation_steps", "2", "--matching_learning_rate", "1e-3", "--lr_scheduler", "constant"]
    out = tmp_path / "out"
    assert main([*SHORT, *prompts, *alone, "--output_dir", str(out)]) == 0
    assert not list((tmp_path / "cache").glob("paths-*/*.safetensors"))
    for expert in experts():
        begun = Teacher(str(TINY_WAN)).expert(expert, torch.bfloat16).float().state_dict()
        moved = weights(out, expert.name)
        name = "blocks.0.ffn.net.2.weight"
        assert (moved[name] - begun[name]).abs().mean() > 2e-4


@pytest.mark.slow
def test_validation_shows_the_students_of_both_experts(
    tmp_path: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the last stage that each has finished left it; the teacher's own only before the first one."""
    shown, pipeline_of, load = list[tuple[str, ...]](), Teacher.pipeline, evaluate.load_student
    left: list[str] = []

    def note(self: Teacher, *args: Any, **students: Any) -> Any:
        shown.append((*sorted(students), *left))
        left.clear()
        return pipeline_of(self, *args, **students)

    monkeypatch.setattr(Teacher, "pipeline", note)
    monkeypatch.setattr(evaluate, "load_student", lambda *args: (left.append(args[2].name), load(*args))[1])
    monkeypatch.setattr(evaluate.Judge, "report", lambda self, experts: {})
    argv = [*SHORT, *prompts, "--max_train_steps", "1", "--distribution_matching_steps", "1", "--use_ema"]
    argv += ["--validation_prompts", PROMPTS[0], "--validation_steps", "1", "--output_dir", str(tmp_path / "out")]
    assert main(argv) == 0
    first, second = "transformer", "transformer_2"
    assert shown[1:] == [
        (first,), (first, second, "segments"), (first, second, "segments"), (first, second, "matching"),
    ]  # fmt: skip


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
    argv = [*SHORT, *prompts, "--expert", "low", "--segment_weight", "0", "--output_dir", str(tmp_path / "out")]
    assert main(argv) == 0
    (folder,) = (tmp_path / "cache").glob("paths-*")
    kept = torch.stack([load_file(path)["tensor"][0] for path in sorted(folder.glob("*.safetensors"))])
    assert len(starts) == 2
    for state in torch.cat(starts):
        assert (kept - state).abs().amax((1, 2, 3, 4)).min() == 0
    assert same(weights(tmp_path / "out"), load_file(TINY_WAN / "transformer/diffusion_pytorch_model.safetensors"))


@pytest.mark.slow
def test_under_fsdp_the_second_stage_learns_as_under_ddp(tmp_path: Path, prompts: list[str]) -> None:
    common = [*SHORT, *prompts, "--checkpointing_steps", "2", "--output_dir"]
    sharded = run(*common, tmp_path / "fsdp", launch=IN_TWO_PROCESSES, module="tests.fsdp_on_cpu")
    assert sharded.returncode == 0, sharded.stderr
    whole = run(*common, tmp_path / "ddp", launch=IN_TWO_PROCESSES)
    assert whole.returncode == 0, whole.stderr
    for expert in experts():
        one, two = weights(tmp_path / "fsdp", expert.name), weights(tmp_path / "ddp", expert.name)
        begun = Teacher(str(TINY_WAN)).expert(expert, torch.float32).state_dict()
        moved = torch.stack([(two[name] - begun[name]).norm() for name in two]).norm()
        assert torch.stack([(one[name] - two[name]).norm() for name in two]).norm() < 0.03 * moved


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
    args.sample_guidance_scale_2 = 4.0
    (before, _), (after, _) = ((data.latents.folder, data.look(teacher, torch.float32)) for _ in range(2))
    assert before != after


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's compiler has warnings of its own
def test_paths_are_sampled_by_compiled_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both experts, where training is compiled; the paths stay what they are."""
    teacher, compiled, paths = Teacher(str(TINY_WAN)), list[bool](), list[torch.Tensor]()
    pipeline_of = Teacher.pipeline
    pipes: list[Any] = []
    monkeypatch.setattr(Teacher, "pipeline", lambda *args, **kw: (pipes.append(pipeline_of(*args, **kw)), pipes[-1])[1])
    for flags in ([], ["--compile"]):
        args = parse(DOC, [*flags, "--samples_per_prompt", "1", "--cache_dir", str(tmp_path / str(len(flags)))])
        args.num_inference_steps = 4
        data = Data(args, PROMPTS[:1], [])
        data.look(teacher, torch.float32)
        data.texts = [torch.ones(3, 64), torch.zeros(2, 64)]
        data.sample([0], teacher, torch.device("cpu"), torch.float32, True)
        paths.append(data.latents.get(data.names[0]))
        models = (pipes[-1].transformer, pipes[-1].transformer_2)
        compiled.append(all(block._compiled_call_impl is not None for model in models for block in model.blocks))
    assert compiled == [False, True]
    torch.testing.assert_close(*paths, rtol=1e-3, atol=1e-3)
    # Attention in 8 bits gives other paths, which are kept apart.
    args.teacher_attention, before = "float8", data.latents.folder
    data.look(teacher, torch.float32)
    assert data.latents.folder != before


def test_a_sample_is_kept_for_what_it_is(tmp_path: Path) -> None:
    """One more prompt, another order and another seed leave the others' noise and names as they were."""
    few = Data(parse(DOC, ["--samples_per_prompt", "2"]), PROMPTS[:2], [])
    more = Data(parse(DOC, ["--samples_per_prompt", "3", "--seed", "5"]), [PROMPTS[7], *PROMPTS[:2]], [])
    assert set(few.names) < set(more.names)
    assert len(set(more.names)) == 9
    assert set(few.seeds) < set(more.seeds)
    assert not torch.equal(noise_of(more.seeds[0], (4,)), noise_of(more.seeds[1], (4,)))


@pytest.mark.slow
def test_one_more_prompt_costs_its_own_paths(
    tmp_path: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate.Judge, "report", lambda self, experts: {})
    monkeypatch.setattr(train, "train", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    argv = [*SHORT, *prompts, "--output_dir", str(tmp_path / "out")]
    teacher = shutil.copytree(TINY_WAN, tmp_path / "a/teacher")
    as_tiny = ["--height", "64", "--width", "64", "--num_frames", "5", "--max_sequence_length", "16"]
    as_tiny += [
        "--student_steps",
        "2",
        "--sample_guidance_scale",
        "3",
        "--mixed_precision",
        "no",
        "--pretrained_model_name_or_path",
    ]

    def paths() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("paths-*/*.safetensors")}

    with pytest.raises(KeyboardInterrupt):
        main([*argv, *as_tiny, str(teacher)])
    before = paths()
    assert len(before) == 4
    # A copy elsewhere, with a README, is the same teacher.
    moved = copied(tmp_path / "b/moved")
    (moved / "README.md").write_text("mine")
    (tmp_path / "prompts.txt").write_text(TWO + PROMPTS[20] + "\n")
    with pytest.raises(KeyboardInterrupt):
        main([*argv, *as_tiny, str(moved)])
    after = paths()
    assert len(after) == 6
    assert {path: after[path] for path in before} == before
    # One whose weights are others is not.
    file = moved / "transformer_2/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["proj_out.weight"] = state["proj_out.weight"] * 1.01
    save_file(state, file, metadata={"format": "pt"})
    assert Teacher(str(moved)).key() != Teacher(str(teacher)).key()


@pytest.mark.filterwarnings("default")  # layer norm is not fused on CPUs in bf16
@pytest.mark.parametrize("flags", [[], ["--expert", "high", "--mixed_precision", "bf16", "--compile"], VELOCITY])
def test_a_plan_is_all_that_is_made(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*flags, "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ("steps of the student, by their timesteps: transformer takes 999" in lines[0]) == (flags != VELOCITY)
    (made,) = (line for line in lines if " to make, " in line)
    assert made.startswith(f"{'latents' if flags == VELOCITY else 'paths'} of 24 steps: 1,920 to make, 0 to reuse; ")
    (disk,) = (line for line in lines if line.startswith("disk: "))
    total, out, cache = (float(number) for number in re.findall(r"\d+\.\d+", disk))
    assert total == pytest.approx(out + cache, abs=0.011)
    assert min(out, cache) > 0
    assert any(line.startswith("matching: 300 steps of 32 for each expert, ") for line in lines) == (flags != VELOCITY)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_counts_what_an_update_passes() -> None:
    """Two experts of six blocks at four steps: the low-noise one's states cost 2.5 passes of the student on average."""
    args = parse(DOC, ["--student_steps", "4"])
    args.student_blocks = 6
    assert plan.step_blocks(args, "segments", 6, [0, 1]) == (0, 6)
    assert plan.step_blocks(args, "matching", 6, [2, 3]) == (2.5 * 6 + 3 * 6, 2 * 6 + 2 * 6)
    args.segment_weight, args.expert = 0, "low"
    assert plan.step_blocks(args, "matching", 6, [2, 3]) == (0.5 * 6 + 3 * 6, 6 + 2 * 6)
    args.guidance_scale = 3
    assert plan.step_blocks(args, "velocity", 6, [0]) == (2 * 6, 6)
    millions = plan.parameters(Teacher(str(TINY_WAN)).transformer)
    assert millions == 794_848
    args = parse(DOC, [*VELOCITY, "--mixed_precision", "bf16", "--use_ema"])
    args.student_blocks = 6
    assert plan.memory(args, Teacher(str(TINY_WAN)).transformer) == (16 + 4 + 2) * millions


def test_the_cache_is_counted_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Paths of two steps in float32, 16 x 2 x 8 x 8 numbers each, on one disk with all else."""
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 10**9))
    with pytest.raises(SystemExit):
        main(["--samples_per_prompt", "40000", "--plan", "--output_dir", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert "--cache_dir" in err
    assert float(err.split("about ")[1].split(" GB")[0]) == pytest.approx(48 * 40_000 * 2 * 2048 * 4 / 1e9, abs=0.2)


def test_hours_are_told_as_people_say_them() -> None:
    told = [plan.told_hours(hours) for hours in (2.25, 0.5, 0.02, 0.001)]
    assert told == ["2.2 hours", "30 minutes", "1 minute", "under a minute"]


def test_another_shift_is_the_teachers_own_as_well() -> None:
    teacher, other = Teacher(str(TINY_WAN)), Teacher(str(TINY_WAN), shift=3.0)
    pipe = other.pipeline(torch.device("cpu"), torch.float32)
    assert (pipe.scheduler.config.flow_shift, pipe.scheduler.config.use_flow_sigmas) == (3.0, True)
    assert pipeline.nodes(other.scheduler, 2).timesteps.tolist() == [999, 750]
    assert {expert.shift for expert in other.experts} == {3.0}
    assert other.key() != teacher.key()


def test_a_real_teacher_has_500_prompts_to_start_with(tmp_path: Path) -> None:
    """They are what their script prints, and vary as the page says."""
    args = parse(DOC, ["--pretrained_model_name_or_path", "someone/wan"])
    shipped = read_prompts(args)
    assert shipped == prompts_of_ours.prompts()
    assert len(set(shipped)) == 500
    subjects = [subject for subject, *_ in prompts_of_ours.SCENES]
    assert len(set(subjects)) == 50
    assert all(sum(p.startswith(subject) for p in shipped) == 10 for subject in subjects)
    assert {sum(camera in p for p in shipped) for camera in prompts_of_ours.CAMERAS} == {35, 36}
    for _, motions, places, kind in prompts_of_ours.SCENES:
        assert all(any(word in p for p in shipped) for word in (*motions, *places))
        assert kind in prompts_of_ours.LIGHTS
    assert 21.5 < sum(len(p.split()) for p in shipped) / 500 < 22.5
    assert (args.student_steps, args.distribution_matching_steps, args.mixed_precision) == (2, 500, "bf16")
    assert parse(DOC, ["--train_data_dir", str(tmp_path)]).student_steps == 0


def test_wan_is_led_away_from_its_own_negative_prompt() -> None:
    assert parse(DOC, []).negative_prompt == ""
    wan = ["--pretrained_model_name_or_path", "someone/wan"]
    assert "过曝" in parse(DOC, wan).negative_prompt
    assert parse(DOC, [*wan, "--negative_prompt", "mine"]).negative_prompt == "mine"

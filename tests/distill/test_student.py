"""A student: the blocks that it begins with, the nodes that it steps between, the file that it is saved to."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from tests.distill.running import experts, same
from tiedquiet.distill import output, pipeline
from tiedquiet.distill.data import Data
from tiedquiet.distill.options import TINY_WAN, parse
from tiedquiet.distill.pipeline import Expert, Teacher
from tiedquiet.distill.tiny.clips import PROMPTS
from tiedquiet.distill.train import __doc__ as DOC


def test_a_student_begins_with_the_teachers_blocks() -> None:
    assert pipeline.groups(8, 4) == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    assert pipeline.groups(7, 3) == [range(2), range(2, 4), range(4, 7)]
    frozen = Teacher(str(TINY_WAN)).expert(experts()[0], torch.float32)
    begun = pipeline.new_student(frozen, 3, torch.float32)
    assert torch.equal(begun.blocks[1].ffn.net[2].weight, frozen.blocks[2].ffn.net[2].weight)
    whole = pipeline.new_student(frozen, 6, torch.float32)
    assert same(whole.state_dict(), frozen.state_dict())
    small = pipeline.new_student(Teacher(str(TINY_WAN)).expert(experts()[0], torch.bfloat16), 2, torch.bfloat16)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16, torch.float32}
    assert small.blocks[0].scale_shift_table.dtype == torch.float32


def test_the_saved_student_is_the_trained_module(tmp_path: Path) -> None:
    teacher = Teacher(str(TINY_WAN))
    trained = pipeline.new_student(teacher.expert(experts()[1], torch.float32), 3, torch.float32).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.01)
    pipeline.save_weights(trained.config, trained.state_dict(), tmp_path / "weights")
    args = parse(DOC, ["--student_dtype", "float32", "--student_steps", "0"])
    output.write_pipeline(args, teacher, {"transformer_2": tmp_path / "weights"}, tmp_path / "student")
    pipe = WanPipeline.from_pretrained(tmp_path / "student")
    inputs = (torch.randn(1, 16, 3, 8, 8), torch.tensor([500.0]), torch.randn(1, 16, 64))
    with torch.no_grad():
        torch.testing.assert_close(pipe.transformer_2(*inputs).sample, trained(*inputs).sample)
    assert same(pipe.transformer_2.state_dict(), trained.state_dict())
    assert len(pipe.transformer.blocks) == 6


def test_a_student_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, target, args = Teacher(str(TINY_WAN)), tmp_path / "student", parse(DOC, ["--student_steps", "0"])
    copytree, copied = shutil.copytree, []

    def fails_later(source: Path, place: Path, **how: Any) -> None:
        if copied:
            raise OSError("disk full")
        copied.append(copytree(source, place, **how))

    monkeypatch.setattr(output.shutil, "copytree", fails_later)
    with pytest.raises(OSError, match="disk full"):
        output.write_pipeline(args, teacher, {}, target)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    output.write_pipeline(args, teacher, {}, target)
    (target / "mine").write_text("")
    with pytest.raises(FileExistsError, match="student"):
        output.write_pipeline(args, teacher, {}, target)
    assert (target / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    output.write_pipeline(args, Teacher(str(target)), {}, tmp_path / "its_own")  # its config tells the truth already
    assert json.loads((tmp_path / "its_own/text_encoder/config.json").read_text())["tie_word_embeddings"] is True


def test_the_nodes_of_the_student_lie_on_the_teachers_path() -> None:
    config = Teacher(str(TINY_WAN)).scheduler
    few, many = pipeline.few_steps(config, 4), pipeline.few_steps(config, 24, order=2)
    few.set_timesteps(4)
    many.set_timesteps(24)
    torch.testing.assert_close(few.sigmas, many.sigmas[::6])
    assert few.timesteps.tolist() == many.timesteps[::6].tolist() == [999, 937, 833, 625]


def segments_of(teacher: Teacher, paths: torch.Tensor, expert: Expert) -> dict[str, torch.Tensor]:
    data = Data(parse(DOC, []), PROMPTS, [])
    data.nodes = pipeline.nodes(teacher.scheduler, 4)
    return data.segments(paths, expert, torch.Generator().manual_seed(0))


def test_one_step_of_a_segments_velocity_leads_from_node_to_node() -> None:
    teacher = Teacher(str(TINY_WAN))
    paths = torch.randn(40, 5, 16, 2, 8, 8)
    for expert, its in zip(experts(), ({999, 937}, {833, 625}), strict=True):
        chosen = segments_of(teacher, paths, expert)
        assert set(chosen["timesteps"].tolist()) == its
        for k, timestep in enumerate((999, 937, 833, 625)):
            rows = chosen["timesteps"] == timestep
            if timestep in its:
                scheduler = pipeline.few_steps(teacher.scheduler, 4)
                scheduler.set_timesteps(4)
                scheduler.set_begin_index(k)
                reached = scheduler.step(chosen["target"][rows], timestep, chosen["x"][rows], return_dict=False)[0]
                torch.testing.assert_close(reached, paths[rows, k + 1], rtol=1e-3, atol=1e-3)

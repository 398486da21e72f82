"""The teacher: its tied text encoder, the tiny one that ships, and how that was made."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from transformers import UMT5Config

from tests.distill.running import SHORT, TWO, VELOCITY, copied
from tiedquiet.distill import pipeline
from tiedquiet.distill.options import TINY_WAN
from tiedquiet.distill.pipeline import Teacher
from tiedquiet.distill.tiny import recipe
from tiedquiet.distill.tiny.clips import PROMPTS
from tiedquiet.distill.train import main


def test_an_encoder_without_its_embedding_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(tmp_path / "teacher")
    file = folder / "text_encoder/model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "shared.weight"}, file, metadata={"format": "pt"})
    argv = ["--pretrained_model_name_or_path", str(folder), "--prompts_file", str(tmp_path / "prompts.txt")]
    argv += ["--mixed_precision", "no"]
    (tmp_path / "prompts.txt").write_text(TWO)
    with pytest.raises(SystemExit):
        main([*argv, "--height", "64", "--width", "64", "--output_dir", str(tmp_path / "out"), *SHORT, *VELOCITY])
    assert "not proven to come from the checkpoint: encoder.embed_tokens.weight" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_broken_tie_stops_the_run_or_is_repaired(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = Teacher(str(TINY_WAN))
    whole = next(teacher.embed([PROMPTS[0]], False, 16, torch.device("cpu"), torch.float32))
    broken = next(teacher.embed([PROMPTS[0]], False, 16, torch.device("cpu"), torch.float32, broken=True))
    mended = next(teacher.embed([PROMPTS[0]], True, 16, torch.device("cpu"), torch.float32, broken=True))
    assert torch.equal(whole, mended)
    assert not torch.allclose(whole, broken, atol=0.1)
    # As transformers 5.0 to 5.2 load it: the config's word is taken, and the run must stop.
    config = untied_config(teacher)
    monkeypatch.setattr(type(config), "from_pretrained", classmethod(lambda cls, *args, **kwargs: config))
    with pytest.raises(SystemExit):
        teacher.text_encoder(False, torch.float32)
    assert "--repair_ties ties it and goes on" in capsys.readouterr().err
    teacher.text_encoder(True, torch.float32)


@pytest.mark.filterwarnings("ignore")
def test_a_transformer_that_is_not_whole_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what its files lack diffusers only warns; later it fails to move it."""
    folder = copied(tmp_path / "teacher")
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    state, name = load_file(file), "blocks.0.attn1.to_q.weight"
    for wrong, words in (
        ({k: v for k, v in state.items() if k != name}, f"its files lack 1 of its weights: {name}"),
        (state | {name: state[name][:32].clone()}, f"cannot be read: Cannot load because {name} expected shape"),
        ({}, "its files lack "),
    ):
        save_file(wrong, file, metadata={"format": "pt"})
        with pytest.raises(SystemExit):
            Teacher(str(folder)).pipeline(torch.device("cpu"), torch.float32)
        assert f"{file.parent}: {words}" in capsys.readouterr().err
    file.write_bytes(b"torn")
    with pytest.raises(SystemExit):
        Teacher(str(folder)).expert(Teacher(str(folder)).experts[0], torch.float32)
    assert f"{file.parent}: cannot be read: " in capsys.readouterr().err


def test_a_shift_may_be_told_in_either_word(tmp_path: Path) -> None:
    config = copied(tmp_path / "teacher") / "scheduler/scheduler_config.json"
    told = json.loads(config.read_text())
    for flow_shift, shift, expected in ((5.0, 3.0, 5), (None, 3.0, 3), (None, None, 1)):
        config.write_text(json.dumps({**told, "flow_shift": flow_shift, "shift": shift}))
        assert {expert.shift for expert in Teacher(str(tmp_path / "teacher")).experts} == {expected}


def untied_config(teacher: Teacher) -> UMT5Config:
    config = UMT5Config.from_pretrained(teacher.folder / "text_encoder")
    config.tie_word_embeddings = False
    return config


@pytest.mark.slow
def test_the_recipe_of_the_tiny_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "wan"
    argv = ["recipe", "--output_dir", str(target), "--vae_steps", "2", "--vae_batch", "1", "--expert_steps", "2"]
    monkeypatch.setattr(sys, "argv", [*argv, "--expert_batch", "1", "--clips", "1"])
    monkeypatch.setattr(recipe, "PROMPTS", PROMPTS[:2])
    monkeypatch.setattr(recipe, "STEPS", 2)
    with pytest.raises(SystemExit, match=r"the VAE's 0\.0% is under 95%; nothing was written"):
        recipe.main()
    monkeypatch.setattr(recipe, "reconstruction", lambda vae, generator: 1.0)
    with pytest.raises(SystemExit, match=r"adherence .* is under 95%; nothing was written"):
        recipe.main()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(recipe, "ADHERENCE", 0.0)
    (target / "before").mkdir(parents=True)
    recipe.main()  # replaces
    assert "adherence, 1 Euler steps: 0.0% guided" in capsys.readouterr().out
    assert not (target / "before").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["wan"]
    stored = load_file(target / "text_encoder/model.safetensors")
    assert "shared.weight" in stored
    assert "encoder.embed_tokens.weight" not in stored
    assert json.loads((target / "text_encoder/config.json").read_text())["tie_word_embeddings"] is False
    pipe = WanPipeline.from_pretrained(target)
    assert (pipe.config.boundary_ratio, pipe.scheduler.config.flow_shift) == (0.875, 5)


def test_what_ships_is_small_and_has_wans_form() -> None:
    assert sum(path.stat().st_size for path in TINY_WAN.rglob("*.safetensors")) <= 6_000_000
    stored = load_file(TINY_WAN / "text_encoder/model.safetensors")
    assert "shared.weight" in stored
    assert "encoder.embed_tokens.weight" not in stored
    index = json.loads((TINY_WAN / "model_index.json").read_text())
    assert (index["_class_name"], index["boundary_ratio"]) == ("WanPipeline", 0.875)


@pytest.mark.slow
def test_what_ships_needs_its_steps_and_its_guidance() -> None:
    pipe = WanPipeline.from_pretrained(TINY_WAN)
    assert recipe.adherence(pipe, recipe.STEPS, recipe.GUIDANCE, seeds=1) >= 0.9
    assert recipe.adherence(pipe, recipe.STEPS, 1.0, seeds=1) <= 0.6
    for steps, at_most in ((2, 0.75), (1, 0.3)):
        pipe.scheduler = pipeline.few_steps(pipe.scheduler.config, steps)
        assert recipe.adherence(pipe, steps, recipe.GUIDANCE, seeds=1) <= at_most


def test_another_shift_is_the_teachers_own_as_well() -> None:
    teacher, other = Teacher(str(TINY_WAN)), Teacher(str(TINY_WAN), shift=3.0)
    pipe = other.pipeline(torch.device("cpu"), torch.float32)
    assert (pipe.scheduler.config.flow_shift, pipe.scheduler.config.use_flow_sigmas) == (3.0, True)
    assert pipeline.nodes(other.scheduler, 2).timesteps.tolist() == [999, 750]
    assert {expert.shift for expert in other.experts} == {3.0}
    assert other.key() != teacher.key()

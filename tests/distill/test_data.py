"""Clips, prompts, the teacher's paths, and the cache that keeps them."""

import contextlib
import gc
import json
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.distill.running import SHORT, TWO, VELOCITY, copied
from tiedquiet.distill import evaluate, train
from tiedquiet.distill import prompts as prompts_of_ours
from tiedquiet.distill.data import Cache, Data, noise_of
from tiedquiet.distill.options import TINY_WAN, parse
from tiedquiet.distill.pipeline import Teacher
from tiedquiet.distill.sources import UselessClip, read_clip, read_metadata, read_prompts
from tiedquiet.distill.tiny.clips import PROMPTS
from tiedquiet.distill.train import __doc__ as DOC
from tiedquiet.distill.train import main


@pytest.mark.slow
# imageio leaves its pipes open where ffmpeg cannot read
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_clips_from_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    movie = np.random.default_rng(0).integers(0, 255, (9, 80, 96, 3), dtype=np.uint8)
    iio.imwrite(folder / "one.mp4", np.repeat(np.repeat(movie, 2, 1), 2, 2), fps=8)
    iio.imwrite(folder / "two.gif", movie, duration=100)
    # A film that is too short is named and left out, and so is one that cannot be read: the others are learnt from.
    iio.imwrite(folder / "short.gif", movie[:2], duration=100)
    (folder / "torn.mp4").write_text("not a film")
    rows = ["one.mp4,a red circle moving left", "short.gif,a blue square", "torn.mp4,another", "two.gif,something else"]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    argv = [*SHORT, *VELOCITY, "--train_data_dir", str(folder), "--output_dir", str(tmp_path / "out")]
    assert main([*argv, "--num_inference_steps", "5"]) == 0
    err = capsys.readouterr().err
    assert f"left out: {folder / 'short.gif'}: has " in err
    assert f"left out: {folder / 'torn.mp4'}: cannot be read" in err
    assert "2 clips are used, 2 are left out" in err
    arms = json.loads((tmp_path / "out/metrics.json").read_text())["arms"]
    assert list(arms) == ["teacher, 5 steps", "untrained, 5 steps", "student, 5 steps", "student, 4 steps"]
    assert "adherence" not in arms["teacher, 5 steps"]
    assert arms["student, 5 steps"]["psnr"] > 0
    kept = sorted((tmp_path / "out/cache").glob("latents-*/*.safetensors"))
    assert len(kept) == 2

    args = parse(DOC, ["--train_data_dir", str(folder)])
    clip = read_clip(folder / "two.gif", args)
    assert clip.shape == (3, 5, 64, 64)
    assert clip.min() >= -1
    assert clip.max() <= 1
    vae = Teacher(str(TINY_WAN)).load_vae(torch.device("cpu"))
    raw = vae.encode(clip[None]).latent_dist.mode()[0]
    mean, deviation = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    (name,) = Data(args, ["something else"], [folder / "two.gif"]).names
    (file,) = (path for path in kept if path.stem == name)
    torch.testing.assert_close(load_file(file)["tensor"], ((raw - mean) / deviation).detach())


def test_images_are_clips_of_one_frame(tmp_path: Path) -> None:
    iio.imwrite(tmp_path / "one.png", np.full((64, 64, 3), 255, dtype=np.uint8))
    clip = read_clip(tmp_path / "one.png", Namespace(num_frames=1, height=64, width=64))
    assert torch.equal(clip, torch.ones(3, 1, 64, 64))


def test_photographs_are_read_as_they_are_looked_at(tmp_path: Path) -> None:
    """Of any colours, turned as their camera says; numbers that would be cut off are refused."""
    red, args = Image.new("RGB", (64, 64), (255, 0, 0)), Namespace(num_frames=1, height=64, width=64)
    for mode, name in (("CMYK", "a.jpg"), ("RGBA", "b.png"), ("P", "c.png")):
        red.convert(mode).save(tmp_path / name)
        means = read_clip(tmp_path / name, args).mean((1, 2, 3)).tolist()
        assert means == pytest.approx([1, -1, -1], abs=0.02), mode
    for mode in ("L", "LA"):
        red.convert(mode).save(tmp_path / "grey.png")
        assert read_clip(tmp_path / "grey.png", args).std(0).max() == 0, mode
    left, exif = Image.new("RGB", (64, 64)), Image.Exif()
    left.paste(red.crop((0, 0, 32, 64)))
    exif[0x0112] = 6  # to be turned by a quarter
    left.save(tmp_path / "turned.jpg", exif=exif)
    clip = read_clip(tmp_path / "turned.jpg", args)
    assert clip[0, 0, :32].mean() > 0.9 > -0.9 > clip[0, 0, 32:].mean()
    Image.fromarray(np.full((64, 64), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UselessClip, match=r"uint16 .* are no colours of 8 bits"):
        read_clip(tmp_path / "deep.png", args)


@pytest.mark.filterwarnings("ignore")  # of its readers
def test_whatever_is_wrong_with_a_clip_it_is_left_out(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    args, read = Namespace(num_frames=2, height=64, width=64), 0
    film = chance.integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    for name in ("a.gif", "a.webp", "a.png"):
        iio.imwrite(tmp_path / name, film if name != "a.png" else film[0])
        whole = (tmp_path / name).read_bytes()
        for n in range(20):
            torn = bytearray(whole)
            torn[place : place + 9] = chance.bytes(9)[: 9 * (n % 2)] if (place := int(chance.integers(80))) else b""
            (tmp_path / f"{n}{name}").write_bytes(torn)
            with contextlib.suppress(UselessClip):
                read_clip(tmp_path / f"{n}{name}", args)
                read += 1
    assert 0 < read < 40
    gc.collect()  # readers that fail leave their files open


def test_a_file_may_begin_with_a_mark(tmp_path: Path) -> None:
    """Spreadsheets and editors write one."""
    args = parse(DOC, ["--prompts_file", str(tmp_path / "p.txt"), "--train_data_dir", str(tmp_path)])
    (tmp_path / "p.txt").write_text("a cat\n", encoding="utf-8-sig")
    assert read_prompts(args) == ["a cat"]
    (tmp_path / "metadata.csv").write_text('file_name,text\np.txt,"a cat, that runs"\n', encoding="utf-8-sig")
    assert read_metadata(args) == [(tmp_path / "p.txt", "a cat, that runs")]


def test_what_is_not_finite_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = Cache(tmp_path, "paths", {})
    for number in (float("nan"), float("inf")):
        with pytest.raises(SystemExit):
            cache.put("one", torch.tensor([1.0, number]), "'a cat'")
        assert "what was made of 'a cat' is not finite, so it is not kept" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_is_there_twice_has_twice_as_many_samples() -> None:
    data = Data(parse(DOC, ["--samples_per_prompt", "2"]), [PROMPTS[0], PROMPTS[1], PROMPTS[0]], [])
    assert data.which == [0, 0, 1, 1, 0, 0]
    assert len(set(data.names)) == 6
    assert data.names[:4] == Data(parse(DOC, ["--samples_per_prompt", "2"]), PROMPTS[:2], []).names


def test_samples_do_not_depend_on_interruptions() -> None:
    data = Data(parse(DOC, [*VELOCITY, "--train_batch_size", "5", "--samples_per_prompt", "1"]), PROMPTS, [])
    data.latents = Namespace(get=lambda name: torch.tensor(data.names.index(name)))  # type: ignore[assignment]
    seen = [int(n) for draw in range(24) for process in range(2) for n in data.batch(draw, process, 2)[0]]
    assert sorted(seen[:48]) == list(range(48)) == sorted(seen[48:96])
    assert seen[:48] != seen[48:96]
    assert torch.equal(data.batch(7, 1, 2)[0], data.batch(7, 1, 2)[0])
    first, second = (data.batch(3, process, 2)[2].initial_seed() for process in (0, 1))
    assert first != second


def test_a_torn_cache_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = Cache(tmp_path, "latents", {})
    cache.put("one", torch.ones(3), "a prompt")
    assert torch.equal(cache.get("one"), torch.ones(3))
    cache.path("one").write_bytes(cache.path("one").read_bytes()[:20])
    with pytest.raises(SystemExit):
        cache.get("one")
    assert f"{cache.path('one')}: is damaged" in capsys.readouterr().err


def test_clips_are_read_at_16_frames_a_second(tmp_path: Path) -> None:
    frames = np.arange(16, dtype=np.uint8)[:, None, None, None] * np.full((1, 64, 64, 3), 16, dtype=np.uint8)
    args = Namespace(num_frames=5, height=64, width=64)
    seen = {}
    for name, milliseconds in (("8", 125), ("16", 62.5), ("32", 31.25)):
        iio.imwrite(tmp_path / f"{name}.gif", frames, duration=milliseconds)
    iio.imwrite(tmp_path / "32.mp4", np.repeat(frames, 2, 0)[:24], fps=32, macro_block_size=1)
    for file in sorted(tmp_path.iterdir()):
        clip = read_clip(file, args)
        seen[file.name] = [round((float(level) + 1) * 127.5 / 16) for level in clip.mean((0, 2, 3))]
    # A gif keeps hundredths of a second: 125 ms become 120, 62.5 become 60, 31.25 become 30.
    assert seen["8.gif"] == [0, 1, 1, 2, 2]
    assert seen["16.gif"] == [0, 1, 2, 3, 4]
    assert seen["32.gif"] == [0, 2, 4, 6, 8]
    assert seen["32.mp4"] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_the_empty_prompt_is_learnt_where_it_will_be_needed(
    tmp_path: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    text = Data.text

    def note(self: Data, numbers: Sequence[int]) -> torch.Tensor:
        seen.append(list(numbers))
        return text(self, numbers)

    monkeypatch.setattr(Data, "text", note)
    monkeypatch.setattr(evaluate.Judge, "report", lambda self, experts: {})
    for name, flags, learnt in (
        ("always", [*VELOCITY, "--empty_prompt_probability", "1"], True),
        ("unguided", [*VELOCITY, "--empty_prompt_probability", "1", "--sample_guidance_scale", "1"], False),
        ("few", ["--empty_prompt_probability", "1", "--distribution_matching_steps", "0"], False),
    ):
        seen.clear()
        argv = [*SHORT, *prompts, *flags, "--expert", "low"]
        assert main([*argv, "--output_dir", str(tmp_path / name)]) == 0
        assert ([2, 2] in seen[-3:]) is learnt, name


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
    argv = [*SHORT, *prompts, "--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "out")]
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

"""The example as its users run it: in processes of their own, and its parts against values made by hand."""

import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import DistributedType
from diffusers import WanPipeline
from diffusers.optimization import get_scheduler
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import UMT5Config

from tests.conftest import TWO
from tests.pages import blocks
from tiedquiet.distill import evaluate, options, output, pipeline, report, speed, train
from tiedquiet.distill.checkpoint import Progress, alone_in, checkpoints
from tiedquiet.distill.data import Cache, Data, read_clip
from tiedquiet.distill.losses import velocity_loss
from tiedquiet.distill.options import TINY_WAN, parse
from tiedquiet.distill.pipeline import Expert, Teacher
from tiedquiet.distill.speed import SelfAttention, in_float8, speed_up
from tiedquiet.distill.tiny import recipe
from tiedquiet.distill.tiny.clips import PROMPTS
from tiedquiet.distill.train import Distillation, main, words_above_the_bar
from tiedquiet.distill.train import __doc__ as DOC
from tiedquiet.distill.train import run as run_main

pytestmark = pytest.mark.usefixtures("own_run")

ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
}
# Small enough to take seconds; few prompts, because every clip that is judged has to be decoded.
SHORT = ["--samples_per_prompt", "2", "--train_batch_size", "2", "--num_inference_steps", "4", "--max_train_steps", "3"]
SHORT += ["--distribution_matching_steps", "2"]
VELOCITY = ["--student_steps", "0", "--distribution_matching_steps", "0"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one long test made, the others use; each finds what was made by its own settings."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def prompts(tmp_path: Path, cache: str) -> list[str]:
    (tmp_path / "prompts.txt").write_text(TWO)
    return ["--prompts_file", str(tmp_path / "prompts.txt"), "--cache_dir", cache]


# `accelerate launch --cpu` would want MPI for this; --multi_gpu is torchrun, and ACCELERATE_USE_CPU keeps it to CPUs.
IN_TWO_PROCESSES = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
IN_TWO_PROCESSES += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def run(
    *args: str | Path, launch: Sequence[str] = (), module: str = "tiedquiet.distill"
) -> subprocess.CompletedProcess[str]:
    """`python -m tiedquiet.distill`, maybe under another launcher."""
    command = [sys.executable, *launch, "-m", module, *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, cwd=Path(__file__).parents[1]
    )


def interrupt(kind: signal.Signals, awaited: str, out: Path, *args: str) -> tuple[int, list[str]]:
    """Send a signal as soon as a file is there; returns the exit status and what stderr has."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tiedquiet.distill", *args, "--output_dir", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        # A shell's background jobs, and all that they start, have SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(out.glob(awaited)) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(kind)
    lines = process.communicate(timeout=120)[1].splitlines()
    return process.returncode, lines


def weights(out: Path, expert: str = "transformer") -> dict[str, torch.Tensor]:
    return load_file(out / "student" / expert / "diffusion_pytorch_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def experts() -> tuple[Expert, Expert]:
    high, low = Teacher(str(TINY_WAN)).experts
    return high, low


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
    root = Path(__file__).parents[1]
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


@pytest.fixture(scope="module")
def ran_through(tmp_path_factory: pytest.TempPathFactory, cache: str) -> tuple[list[str], Path]:
    """The settings of a run through both stages of both experts, and where it is."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "prompts.txt").write_text(TWO)
    common = [*SHORT, "--prompts_file", str(folder / "prompts.txt"), "--cache_dir", cache]
    common += ["--max_train_steps", "8", "--distribution_matching_steps", "6", "--use_ema"]
    done = run(*common, "--output_dir", folder / "out")
    assert done.returncode == 0, done.stderr
    return common, folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["transformer/segments", "transformer_2/matching"])
def test_a_run_that_was_stopped_and_resumed_equals_one_that_ran_through(
    where: str, ran_through: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common, whole = ran_through
    broken = tmp_path / "broken"

    often = [*common, "--checkpointing_steps", "1", "--checkpoints_total_limit", "2"]
    status, lines = interrupt(signal.SIGTERM, f"checkpoints/{where}/checkpoint-*", broken, *often)
    assert status == 128 + signal.SIGTERM
    saved = re.fullmatch(
        r"tiedquiet\.distill: stopped by SIGTERM; saved (\S+); go on with --resume_from_checkpoint latest", lines[-1]
    )
    assert saved, lines[-1]
    assert Path(saved[1]).is_dir()
    assert not (broken / "student").exists()
    assert len(list((broken / "checkpoints/transformer/segments").glob("checkpoint-*"))) <= 2
    assert int(saved[1].split("-")[-1]) < (8 if where.endswith("segments") else 6)

    with pytest.raises(SystemExit):
        main([*common, "--output_dir", str(broken)])
    assert "an unfinished run" in capsys.readouterr().err
    # From the oldest one, so that steps which had been saved are taken once more.
    oldest = checkpoints(broken / "checkpoints" / where)[0]
    assert oldest.parent == Path(saved[1]).parent
    done = run(*common, "--output_dir", broken, "--checkpointing_steps", "1", "--resume_from_checkpoint", oldest)
    assert done.returncode == 0, done.stderr
    for expert in ("transformer", "transformer_2"):
        assert same(weights(whole, expert), weights(broken, expert))
    assert main([*common, "--output_dir", str(broken), "--resume_from_checkpoint", "latest"]) == 0
    assert capsys.readouterr().out.endswith("is finished\n")


@pytest.mark.slow
def test_a_run_may_grow(
    prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends with the weights of one that had as many steps from the beginning."""
    monkeypatch.setattr(evaluate.Judge, "report", lambda self, experts: {})
    constant = ["--lr_scheduler", "constant", "--segment_weight", "0", "--use_ema", "--output_dir"]
    common = [*SHORT, *prompts, "--expert", "low", *constant]
    few = [*common, str(tmp_path / "out"), "--max_train_steps", "2", "--distribution_matching_steps"]
    more = ["--resume_from_checkpoint", "latest", "--checkpointing_steps", "5"]

    def refused(*args: str) -> str:
        with pytest.raises(SystemExit):
            main([*args, *more])
        return capsys.readouterr().err

    assert main([*few, "1", "--checkpointing_steps", "5"]) == 0
    assert "that run had --max_train_steps 2, this one has 1; it may only grow" in refused(
        *few[:-2], "1", *few[-1:], "1"
    )
    assert "student is finished with fewer steps; move it away" in refused(*few, "3")
    (tmp_path / "out/student").rename(tmp_path / "before")
    assert "the second stage goes on from what the first one left, and has begun" in refused(
        *few[:-2], "3", few[-1], "3"
    )
    assert main([*few, "3", *more]) == 0
    assert main([*few, "3", *more]) == 0
    assert capsys.readouterr().out.endswith("is finished\n")

    assert (
        main(
            [
                *few[:-3],
                "--max_train_steps",
                "2",
                "--distribution_matching_steps",
                "3",
                "--output_dir",
                str(tmp_path / "whole"),
            ]
        )
        == 0
    )
    assert same(weights(tmp_path / "out", "transformer_2"), weights(tmp_path / "whole", "transformer_2"))
    assert not same(
        weights(tmp_path / "out", "transformer_2"), load_file(next(tmp_path.glob("before/transformer_2/*.safetensors")))
    )
    # Nor can a first stage be put before a second one.
    alone = [*common, str(tmp_path / "alone"), "--distribution_matching_steps", "1", "--checkpointing_steps", "1"]
    assert main([*alone, "--max_train_steps", "0"]) == 0
    shutil.rmtree(tmp_path / "alone/student")
    assert "the second stage goes on from what the first one left" in refused(*alone, "--max_train_steps", "2")
    # Of a run that kept none there is nothing to go on from.
    with pytest.raises(SystemExit):
        main(
            [
                *few[:-3],
                "--max_train_steps",
                "2",
                "--distribution_matching_steps",
                "4",
                "--output_dir",
                str(tmp_path / "whole"),
                *more,
            ]
        )
    assert "student is finished, and its checkpoints are gone" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out/student")
    for left in checkpoints(tmp_path / "out/checkpoints/transformer_2/matching"):
        shutil.rmtree(left)
    assert "matching: has no checkpoint to go on from" in refused(*few, "4")


def test_the_schedule_of_a_run_that_grew_is_that_of_its_new_length() -> None:
    def schedule(steps: int) -> Any:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        return get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=steps)

    old, new, whole = schedule(4), schedule(8), schedule(8)
    for it in (old, whole):
        for _ in range(3):
            it.optimizer.step()
            it.step()
    before, after = Progress(), Progress()
    before.begin(schedule=old)
    after.begin(schedule=new)
    new.optimizer.load_state_dict(old.optimizer.state_dict())
    after.load_state_dict(before.state_dict())
    assert old.optimizer.param_groups[0]["lr"] != new.optimizer.param_groups[0]["lr"]
    assert new.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


@pytest.mark.slow
def test_a_run_that_diverges_stops_before_it_saves_that(
    tmp_path: Path, prompts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*SHORT, *prompts, "--learning_rate", "1e38", "--lr_warmup_steps", "0", "--checkpointing_steps", "1"]
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--output_dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "transformer, segments, step 2: the loss or its gradient is not finite" in last
    assert [path.name for path in checkpoints(tmp_path / "out/checkpoints/transformer/segments")] == ["checkpoint-1"]


@pytest.mark.slow
def test_ctrl_c_while_caching_keeps_the_cache(tmp_path: Path, prompts: list[str]) -> None:
    many = [*SHORT, *prompts, "--samples_per_prompt", "10000", "--cache_dir", str(tmp_path / "out/cache")]
    status, lines = interrupt(signal.SIGINT, "cache/paths-*/*.safetensors", tmp_path / "out", *many)
    assert status == 128 + signal.SIGINT
    assert lines[-1] == "tiedquiet.distill: interrupted; what was cached stays"
    assert not any("Traceback" in line for line in lines)
    for kept in tmp_path.glob("out/cache/*/*.safetensors"):
        load_file(kept)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--use_ema", "under FSDP no GPU has them"),
        ("--expert=high", "--fsdp_version 2"),
        ("--lora_rank=4", "the base is frozen and lies on every GPU"),
    ],
)
def test_fsdp_refuses_what_it_cannot_do(
    argument: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(SystemExit):
        main([argument, "--output_dir", str(tmp_path / "out")])
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_under_fsdp_it_learns_as_under_ddp(tmp_path: Path, prompts: list[str]) -> None:
    """With the teacher's velocity, so that the teacher is spread over the processes as well."""
    common = [
        *SHORT,
        *prompts,
        *VELOCITY,
        "--student_blocks",
        "6",
        "--mixed_precision",
        "bf16",
        "--expert",
        "high",
        "--checkpointing_steps",
        "2",
    ]
    common += ["--gradient_checkpointing", "attention", "--output_dir"]
    sharded = run(*common, tmp_path / "fsdp", launch=IN_TWO_PROCESSES, module="tests.fsdp_on_cpu")
    assert sharded.returncode == 0, sharded.stderr
    assert json.loads((tmp_path / "fsdp/metrics.json").read_text())["distributed"] == "FSDP"
    whole = run(*common, tmp_path / "ddp", launch=IN_TWO_PROCESSES)
    assert whole.returncode == 0, whole.stderr
    one, two = weights(tmp_path / "fsdp"), weights(tmp_path / "ddp")
    teacher = Teacher(str(TINY_WAN)).expert(experts()[0], torch.float32)
    begun = pipeline.new_student(teacher, 6, torch.float32).state_dict()
    moved = torch.stack([(two[name] - begun[name]).norm() for name in two]).norm()
    assert torch.stack([(one[name] - two[name]).norm() for name in two]).norm() < 0.03 * moved


@pytest.mark.slow
def test_two_processes_under_accelerate(tmp_path: Path, prompts: list[str]) -> None:
    done = run(
        *SHORT, *prompts, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "out/cache",
        "--expert", "high", "--checkpointing_steps", "2",
        "--validation_steps", "1", "--validation_prompts", "a red circle moving left", launch=IN_TWO_PROCESSES,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| teacher, 4 steps") == done.stdout.count("***** Training transformer, segments:") == 1
    assert len(list((tmp_path / "out/validation").iterdir())) == 3 + 2
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["processes"] == 2
    assert len(list((tmp_path / "out/cache").glob("paths-*/*.safetensors"))) == 4
    WanPipeline.from_pretrained(tmp_path / "out/student")


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


def copied(folder: Path, **index: Any) -> Path:
    """A copy of the tiny teacher with another `model_index.json`."""
    shutil.copytree(TINY_WAN, folder)
    told = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**told, **index}))
    return folder


# On the command line, {bad} being the folder below; and what the one line must tell.
TEACHER = ["--prompts_file", "{bad}/a_file", "--pretrained_model_name_or_path"]
CHECKPOINT = "checkpoints/transformer/segments/checkpoint-1"
BAD = {
    "no teacher": ([*TEACHER, "{bad}/nothing"], "no pipeline there"),
    "not Wan": ([*TEACHER, "{bad}/image"], "WanImageToVideoPipeline, not a Wan text-to-video pipeline"),
    "half a pipeline": ([*TEACHER, "{bad}/part"], "the pipeline has no vae/"),
    "one expert": ([*TEACHER, "{bad}/one", "--expert", "high"], "has one transformer"),
    "empty prompts": (["--prompts_file", "{bad}/empty.txt"], "is empty"),
    "no prompts file": (["--prompts_file", "{bad}/nothing.txt"], "No such file"),
    "not UTF-8": (["--prompts_file", "{bad}/latin.txt"], "utf-8"),
    "too many blocks": (["--student_blocks", "9"], "--student_blocks 9: the teacher has 6"),
    "frames": (["--num_frames", "10"], "takes 4k+1 frames, such as 9 or 13"),
    "height": (["--height", "65"], "--height 65: must be a multiple of 16"),
    "guidance": (["--guidance_scale", "0.5"], "1 is no guidance"),
    "a second scale of one": ([*TEACHER[:2], "--pretrained_model_name_or_path", "{bad}/one", "--sample_guidance_scale_2", "3"], "has one transformer, which --sample_guidance_scale guides"),
    "less than no guidance": (["--sample_guidance_scale_2", "0.5"], "1 is no guidance"),
    "the second expert alone": (["--sample_guidance_scale", "1", "--sample_guidance_scale_2", "3"], "guides both experts or none"),
    "validation": (["--validation_steps", "1"], "needs --validation_prompts"),
    "two kinds of data": (["--train_data_dir", "{bad}/jsonl", "--prompts_file", "{bad}/a_file"], "choose one"),
    "output is a file": (["--output_dir", "{bad}/a_file"], "a_file: is a file, not a folder"),
    "below a file": (["--output_dir", "{bad}/a_file/out"], "a_file: is a file, not a folder"),
    "no cache": (["--cache_dir", "{bad}/a_file/cache"], "a_file: is a file, not a folder"),
    "finished": (["--output_dir", "{bad}/done"], "done/student is finished; choose another --output_dir"),
    "torn args.json": (["--output_dir", "{bad}/torn", "--resume_from_checkpoint", "latest"], "torn/args.json cannot be read"),
    "no such tracker": (["--report_to", "paper"], "--report_to paper: not a tracker that is installed here; there are "),
    "warm-up": (["--lr_warmup_steps", "-1"], "-1 is not at least 0"),
    "other steps": (["--num_inference_steps", "5"], "--num_inference_steps 5: must be a multiple of --student_steps"),
    "paths of clips": (["--student_steps", "4", "--train_data_dir", "{bad}/jsonl"], "the teacher's own paths"),
    "a task of paths": (["--student_steps", "4", "--task_weight", "0.1"], "it has no --task_weight"),
    "guided twice": (["--student_steps", "4", "--guidance_scale", "2"], "--sample_guidance_scale guides"),
    "too often": (["--empty_prompt_probability", "2"], "--empty_prompt_probability 2.0: is more than 1"),
    "no metadata": (["--train_data_dir", "{bad}/none"], "has neither metadata.jsonl nor metadata.csv"),
    "no caption": (["--train_data_dir", "{bad}/jsonl"], "row 1 needs file_name and text"),
    "a list for a row": (["--train_data_dir", "{bad}/list"], "list/metadata.jsonl: row 2 needs file_name and text, both texts; it is [1]"),
    "a number for a name": (["--train_data_dir", "{bad}/number"], 'number/metadata.jsonl: row 1 needs file_name and text, both texts; it is {"file_name": 5'),
    "no JSON": (["--train_data_dir", "{bad}/broken"], "metadata.jsonl: "),
    "no such clip": (["--train_data_dir", "{bad}/absent"], "row 1: no file"),
    "no rows": (["--train_data_dir", "{bad}/rowless"], "has no rows"),
    "too short": (["--train_data_dir", "{bad}/short"], "none of its clips can be used, see above"),
    "zero": (["--critic_steps", "0"], "0 is not at least 1"),
    "nothing learnt": (["--max_train_steps", "0", "--distribution_matching_steps", "0"], "nothing would be learnt"),
    "no steps of a velocity": (["--student_steps", "0", "--max_train_steps", "0"], "are for a student of few steps"),
    "matching a velocity": (["--student_steps", "0", "--distribution_matching_steps", "1"], "are for a student of few steps"),
    "no node": (["--student_steps", "1"], "at shift 5 none of them is a step of transformer_2, whose timesteps are 0 to 875; 2, 3, 4, 6, 8, 12, 24 would do, or --expert high to train transformer alone"),
    "no node at Wan2.2's shift": (["--student_steps", "2", "--flow_shift", "12"], "at shift 12 none of them is a step of transformer_2, whose timesteps are 0 to 875; 3, 4, 6, 8, 12, 24 would do, or --expert high"),
    "no shift": (["--flow_shift", "0"], "--flow_shift 0: must be above 0"),
    "a shifted velocity": ([*VELOCITY, "--flow_shift", "3"], "--flow_shift is for a student of few steps"),
    "no node at all": (["--student_steps", "1", "--expert", "low"], "2, 3, 4, 6, 8, 12, 24 would do"),
    "negative": (["--learning_rate", "-1"], "-1 is not a number of at least 0"),
    "unknown flag": (["--blocks", "3"], "unrecognized arguments"),
    "another run": (["--output_dir", "{bad}/run", "--resume_from_checkpoint", "latest"], "that run had --seed 7"),
    "another run's path": (["--resume_from_checkpoint", "{bad}/run/" + CHECKPOINT], "that run had --seed 7, this one has 0"),
    "no checkpoint": (["--resume_from_checkpoint", "{bad}/nothing"], "no checkpoint of transformer or"),
    "no args.json": (["--resume_from_checkpoint", "{bad}/lost/" + CHECKPOINT], "to compare with"),
    "unfinished": (["--output_dir", "{bad}/lost"], "an unfinished run"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    files = {
        "a_file": "",
        "empty.txt": "\n \n",
        "latin.txt": "caf\xe9",
        "none/readme": "",
        "jsonl/metadata.jsonl": '{"file_name": "a.gif"}\n',
        "broken/metadata.jsonl": "{\n",
        "list/metadata.jsonl": '{"file_name": "a_file", "text": "a"}\n[1]\n',
        "list/a_file": "",
        "number/metadata.jsonl": '{"file_name": 5, "text": "a"}\n',
        "absent/metadata.csv": "file_name,text\nnot_there.gif,a prompt\n",
        "rowless/metadata.csv": "file_name,text\n",
        "noise/metadata.csv": "file_name,text\nnoise.mp4,a prompt\n",
        "noise/noise.mp4": "not a film",
        "short/metadata.csv": "file_name,text\nshort.png,a prompt\n",
        "run/args.json": json.dumps(
            {
                **options.settings(parse(DOC, ["--sample_guidance_scale_2", "3"])),
                "student_blocks": 6,
                "task_weight": 0.0,
                "seed": 7,
            }
        ),
        f"run/{CHECKPOINT}/x": "",
        f"lost/{CHECKPOINT}/x": "",
        "done/student/model_index.json": "{}",
        "torn/args.json": '{"seed"',
        f"torn/{CHECKPOINT}/x": "",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="latin-1")
    iio.imwrite(folder / "short/short.png", np.zeros((64, 64, 3), dtype=np.uint8))
    copied(folder / "one", transformer_2=[None, None], boundary_ratio=None)
    copied(folder / "image", _class_name="WanImageToVideoPipeline")
    shutil.rmtree(copied(folder / "part") / "vae")
    return folder


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_one_line(
    what: str, bad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv, told = BAD[what]
    with pytest.raises(SystemExit) as ended:
        main([word.replace("{bad}", str(bad)) for word in argv])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    (line,) = (line for line in err.splitlines() if line.startswith("tiedquiet.distill: "))
    assert told in line
    if what == "too short":  # known only when the clip is read
        assert "short.png: has 1 colour frames at 16 a second, --num_frames is 5" in err
    else:
        assert err == line + "\n"
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
# imageio leaves its pipes open where ffmpeg cannot read
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_bad_input_leaves_no_traceback(bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run("--num_frames", "10")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(SystemExit):
        main(["--train_data_dir", str(bad / "noise"), "--output_dir", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert "noise.mp4: cannot be read" in err
    assert err.splitlines()[-1].endswith("none of its clips can be used, see above")


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(options.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1_000_000))
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path / "out")])
    assert "GB, 0.0 GB are free" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_process_waits_for_the_first_to_say_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    silence: list[str] = []
    monkeypatch.setattr(options.time, "sleep", lambda seconds: silence.append(capsys.readouterr().err))
    with pytest.raises(SystemExit):
        options.fail("only this one knows")
    assert silence == [""]
    assert capsys.readouterr().err == "tiedquiet.distill: only this one knows\n"


@pytest.mark.parametrize(("capability", "words"), [((8, 0), "needs a Hopper GPU"), ((9, 0), "pip install fa3-fwd")])
def test_other_kernels_need(
    capability: tuple[int, int],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The GPU that they run on, and a package."""
    asked = ["--teacher_attention", "float8"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main([*asked, "--output_dir", str(tmp_path / "out")])
    assert "--teacher_attention float8: needs " in (said := capsys.readouterr().err)
    assert words in said
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(speed, "find_spec", lambda name: object())
    speed.check_kernels(parse(DOC, asked))


def test_the_expert_is_chosen_by_timestep() -> None:
    high, low = experts()
    assert (low.low, low.high, high.low, high.high) == (0, 875, 875, 1000)
    uniform = torch.cat([torch.rand(100_000), torch.tensor([0.0, 1.0])])
    assert (high.sigmas(uniform) * 1000 >= 875).all()
    assert (low.sigmas(uniform) * 1000 < 875).all()
    assert high.sigmas(torch.tensor([1.0])) == 1
    # Together they are the schedule's own distribution: 42 % of u lead to the high-noise side at shift 5.
    whole = Expert("transformer", 0, 1000, 1000, 5.0).sigmas(uniform)
    torch.testing.assert_close(whole, 5 * uniform / (1 + 4 * uniform))
    assert (whole >= 0.875).double().mean() == pytest.approx(0.417, abs=0.01)
    edge = 0.875 / (5 - 4 * 0.875)
    torch.testing.assert_close(high.sigmas(uniform), Expert("", 0, 1000, 1000, 5.0).sigmas(edge + (1 - edge) * uniform))


def test_the_loss_by_hand() -> None:
    one = torch.ones(2, 1, 1, 1, 1)
    loss, parts = velocity_loss(3 * one, one, 2 * one, 0.5)
    assert loss.item() == pytest.approx((3 - 1) ** 2 + 0.5 * (3 - 2) ** 2)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx({"velocity": 4, "task": 1})
    half, parts = velocity_loss(one.bfloat16() * 1.01, one.bfloat16(), None, 0.5)
    assert half.dtype == torch.float32
    assert list(parts) == ["velocity"]


def step(
    args: Namespace, checkpointing: str | None = None, empty: bool = False, wrap: Callable[..., Any] = lambda it: it
) -> tuple[Any, torch.Tensor, dict[str, Any]]:
    """A student, the loss of one fixed batch, its parts."""
    torch.manual_seed(0)
    expert = experts()[0]
    frozen = Teacher(str(TINY_WAN)).expert(expert, torch.float32)
    learner = pipeline.new_student(frozen, 4, torch.float32).train()
    args.gradient_checkpointing, args.task_weight = checkpointing, 0.05
    distillation = Distillation(args, frozen, learner, expert)
    speed_up([frozen], [learner], args)
    distillation.student = wrap(learner)
    x0 = torch.randn(2, 16, 3, 8, 8)
    inputs = distillation.noisy(x0, torch.Generator().manual_seed(1))
    sigma = (inputs["timesteps"] / 1000).view(-1, 1, 1, 1, 1)
    # x = (1 - sigma) x0 + sigma noise, task = noise - x0
    torch.testing.assert_close(inputs["x"] - sigma * inputs["task"], x0)
    text = torch.randn(2, 16, 64)
    loss, parts = distillation.loss(**inputs, text=text, empty=torch.zeros_like(text) if empty else None)
    loss.backward()
    return learner, loss.detach(), parts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpointing", "compiled"),
    [("blocks", []), ("attention", []), (None, ["--compile"]), ("attention", ["--compile"])],
)
@pytest.mark.filterwarnings("default")  # torch's compiler has warnings of its own
def test_saving_memory_or_time_changes_nothing_else(checkpointing: str | None, compiled: list[str]) -> None:
    plain, loss, _ = step(parse(DOC, []))
    saving, other, _ = step(parse(DOC, compiled), checkpointing)
    torch.testing.assert_close(loss, other)
    for one, two in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("process_group")
def test_compiled_blocks_learn_under_ddp_where_its_buckets_are_smaller() -> None:
    plain, loss, _ = step(parse(DOC, []))
    wrapped, other, _ = step(
        parse(DOC, ["--compile"]), wrap=lambda learner: DistributedDataParallel(learner, bucket_cap_mb=0.01)
    )
    torch.testing.assert_close(loss, other)
    for one, two in zip(plain.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_what_gets_gradients_of_the_modulation_wrong_on_gpus_is_off_where_blocks_are_compiled() -> None:
    inductor, seen = torch._inductor.config, list[bool]()

    def note(graph: Any) -> None:
        seen.append(inductor.triton.mix_order_reduction)

    if not hasattr(inductor.triton, "mix_order_reduction"):
        pytest.skip("this torch does not have it")
    torch._dynamo.reset()
    with inductor.patch({"post_grad_custom_post_pass": note, "triton.mix_order_reduction": True}):
        step(parse(DOC, ["--compile"]))
        assert len(seen) >= 3  # teacher, student, its backward pass
        assert not any(seen)
        assert inductor.triton.mix_order_reduction  # elsewhere it is left as it was


class Counting(TorchDispatchMode):
    """Counts forward attention, and products that give fewer numbers than they take."""

    attention = narrowing = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(func) and "backward" not in str(func):
            self.attention += 1
        if str(func) == "aten.addmm.default":  # backward there is no bias to add
            self.narrowing += args[2].shape[0] == 192
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("checkpointing", "again"), [(None, 0), ("blocks", 4), ("attention", 0)])
def test_what_is_computed_again(checkpointing: str | None, again: int) -> None:
    with Counting() as counting:
        step(parse(DOC, []), checkpointing)
    assert counting.narrowing == 6 + 4 + again  # six blocks of the teacher, four of the student
    assert counting.attention == 2 * counting.narrowing  # to all tokens, and to the text


def test_attention_in_8_bits_is_close_to_the_teachers_own() -> None:
    frozen = Teacher(str(TINY_WAN)).expert(experts()[0], torch.float32).eval()
    inputs = torch.randn(2, 16, 3, 8, 8), torch.tensor([900.0, 950.0]), torch.randn(2, 16, 64)

    def attend(*tensors: torch.Tensor, **scales: torch.Tensor) -> torch.Tensor:
        assert {tensor.dtype for tensor in tensors} == {torch.float8_e4m3fn}
        whole = (t.float() * s[:, None, :, None] for t, s in zip(tensors, scales.values(), strict=True))
        return scaled_dot_product_attention(*(t.transpose(1, 2) for t in whole)).transpose(1, 2)

    with torch.no_grad():
        native = frozen(*inputs, return_dict=False)[0]
        for block in frozen.blocks:
            block.attn1.set_processor(SelfAttention(partial(in_float8, attend)))
        rounded = frozen(*inputs, return_dict=False)[0]
    error = (rounded - native).norm() / native.norm()
    assert 0 < error < 0.05, error


def test_self_attention_by_other_kernels_is_self_attention() -> None:
    learner = Teacher(str(TINY_WAN)).expert(experts()[0], torch.float32)
    inputs = torch.randn(2, 16, 3, 8, 8), torch.tensor([900.0, 950.0]), torch.randn(2, 16, 64)

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(*(t.transpose(1, 2) for t in tensors)).transpose(1, 2)

    def gradients() -> dict[str, torch.Tensor]:
        learner.zero_grad()
        learner(*inputs, return_dict=False)[0].square().mean().backward()
        return {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}

    native = gradients()
    for block in learner.blocks:
        block.attn1.set_processor(SelfAttention(attend))
    torch.testing.assert_close(gradients(), native)


def test_guidance_distillation_learns_the_guided_velocity() -> None:
    _, _, plain = step(parse(DOC, []))
    _, _, same_again = step(parse(DOC, ["--guidance_scale", "1"]), empty=True)
    _, _, guided = step(parse(DOC, ["--guidance_scale", "3"]), empty=True)
    torch.testing.assert_close(plain["velocity"], same_again["velocity"])
    assert not torch.isclose(plain["velocity"], guided["velocity"])
    assert torch.equal(plain["task"], guided["task"])


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


def test_two_processes_may_write_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, own = tmp_path / "cache.json", os.getpid()
    with options.beside(place) as one:
        one.write_text("one")
        monkeypatch.setattr(os, "getpid", lambda: own + 1)
        with options.beside(place) as two:
            two.write_text("two")
        assert place.read_text() == "two"
    assert place.read_text() == "one"

    def torn() -> None:
        with options.beside(place) as part:
            part.write_text("half")
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        torn()
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]
    assert place.read_text() == "one"


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


def untied_config(teacher: Teacher) -> UMT5Config:
    config = UMT5Config.from_pretrained(teacher.folder / "text_encoder")
    config.tie_word_embeddings = False
    return config


def test_samples_do_not_depend_on_interruptions() -> None:
    data = Data(parse(DOC, [*VELOCITY, "--train_batch_size", "5", "--samples_per_prompt", "1"]), PROMPTS, [])
    data.latents = Namespace(get=lambda name: torch.tensor(data.names.index(name)))  # type: ignore[assignment]
    seen = [int(n) for draw in range(24) for process in range(2) for n in data.batch(draw, process, 2)[0]]
    assert sorted(seen[:48]) == list(range(48)) == sorted(seen[48:96])
    assert seen[:48] != seen[48:96]
    assert torch.equal(data.batch(7, 1, 2)[0], data.batch(7, 1, 2)[0])
    first, second = (data.batch(3, process, 2)[2].initial_seed() for process in (0, 1))
    assert first != second


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


def test_a_torn_cache_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = Cache(tmp_path, "latents", {})
    cache.put("one", torch.ones(3))
    assert torch.equal(cache.get("one"), torch.ones(3))
    cache.path("one").write_bytes(cache.path("one").read_bytes()[:20])
    with pytest.raises(SystemExit):
        cache.get("one")
    assert f"{cache.path('one')}: is torn" in capsys.readouterr().err


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


# imageio leaves its pipes open where ffmpeg ends before it is told to
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_large_film_is_tracked_as_a_small_gif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "GIF_LIMIT", 60_000)
    film = report.write_film([torch.rand(2, 5, 3, 64, 64)], tmp_path / "a.gif")
    assert film.suffix == ".mp4"
    tracker = TensorBoardTracker("run", tmp_path / "logs")
    tracker.start()
    report.track_film([tracker, Namespace(name="another")], film, "films", 7)
    tracker.finish()
    (shown,) = EventAccumulator(str(tmp_path / "logs/run"), size_guidance={"images": 0}).Reload().Images("films")
    assert len(shown.encoded_image_string) < 60_000
    assert iio.imread(shown.encoded_image_string, extension=".gif").shape == (5, shown.height, shown.width, 3)
    assert (shown.height, shown.width) == (64, 128)  # of 128 and 256


def test_a_large_film_is_no_gif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = [torch.rand(2, 5, 3, 64, 64)]
    assert report.write_film(film, tmp_path / "a.gif") == tmp_path / "a.gif"
    monkeypatch.setattr(report, "GIF_LIMIT", 1000)
    assert report.write_film(film, tmp_path / "b.gif") == tmp_path / "b.mp4"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "b.mp4"]
    assert (tmp_path / "b.mp4").read_bytes()[4:8] == b"ftyp"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "moment", "words"),
    [
        (20_000, "a path", "the disk: File too large; what was saved before stays"),
        (5_000_000, "a checkpoint", "the disk: a checkpoint could not be written; what was saved before stays"),
    ],
)
def test_a_full_disk_gets_one_line(limit: int, moment: str, words: str, tmp_path: Path, prompts: list[str]) -> None:
    """No file may grow beyond the limit, which is to its writer what a full disk is."""
    command = [sys.executable, "-m", "tiedquiet.distill", *SHORT, *prompts, "--samples_per_prompt", "1"]
    command += ["--cache_dir", str(tmp_path / "cache")]
    command += ["--expert", "low", "--checkpointing_steps", "1", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        # Measuring coverage, it would also fail to write that.
        env={name: value for name, value in ENVIRONMENT.items() if not name.startswith("COVERAGE")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, (moment, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"tiedquiet.distill: {words}"


def test_an_interrupt_outside_training_says_what_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "main", interrupted)
    assert train.run() == 130
    assert capsys.readouterr().err == "tiedquiet.distill: interrupted; what was cached stays\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "x/args.json"), "x/args.json: No space left on device"),
        (OSError(30, "Read-only file system"), "the disk: Read-only file system"),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device")]), "No space left on device')]"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "the disk: No space left on device; what was saved before stays",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/3"),
            "the disk: a checkpoint could not be written; what was saved before stays",
        ),
    ],
)
def test_whatever_the_world_lacks_is_told_in_one_line(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> int:
        raise error

    monkeypatch.setattr("tiedquiet.distill.train.main", fails)
    with pytest.raises(SystemExit) as stopped:
        run_main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tiedquiet.distill: ")
    assert line.endswith(words)


def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> int:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("tiedquiet.distill.train.main", fails)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_main()


@pytest.mark.slow
def test_ctrl_c_while_the_samples_are_drawn_says_what_is_there(
    tmp_path: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    argv = [*SHORT, *prompts, "--expert", "low", "--output_dir", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(train, "write_pipeline", interrupted)
        assert main(argv) == 130
    assert "interrupted; training is complete; --resume_from_checkpoint latest finishes" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(evaluate.Judge, "report", interrupted)
        assert main([*argv, "--resume_from_checkpoint", "latest"]) == 130
    assert "interrupted; the student is complete" in capsys.readouterr().err
    written = (tmp_path / "out/student/model_index.json").stat().st_mtime_ns
    assert main([*argv, "--resume_from_checkpoint", "latest"]) == 0
    assert (tmp_path / "out/student/model_index.json").stat().st_mtime_ns == written
    assert (tmp_path / "out/student/README.md").exists()
    assert not (tmp_path / "out/checkpoints").exists()


HOLDS = """
import sys
from pathlib import Path
from tiedquiet.distill.checkpoint import alone_in
with alone_in(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_kept_out_of_the_folder_and_a_crash_leaves_no_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, pipe = tmp_path / "out", subprocess.PIPE
    command = [sys.executable, "-c", HOLDS, str(out)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=ENVIRONMENT) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "in\n"
        with pytest.raises(SystemExit) as ended:
            main(["--output_dir", str(out)])
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{out}: another run is in there (process {first.pid} on " in line
        assert [path.name for path in out.iterdir()] == [".lock"]
        assert main(["--output_dir", str(out), "--plan"]) == 0  # writes nothing
        with monkeypatch.context() as patched:
            patched.setenv("RANK", "1")  # the first process holds it for all
            with alone_in(out):
                pass
        first.kill()
    with alone_in(out):
        assert f"process {os.getpid()} on " in (out / ".lock").read_text()
    # A file system without locks: it is said, and the run goes on.
    monkeypatch.setattr("fcntl.flock", lambda *args: (_ for _ in ()).throw(OSError(38, "Function not implemented")))
    with alone_in(out):
        assert "cannot be locked (Function not implemented)" in capsys.readouterr().err


def test_another_number_of_processes_does_not_resume(
    bad: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = ["--output_dir", str(bad / "run"), "--resume_from_checkpoint", "latest", "--seed", "7"]
    with pytest.raises(SystemExit):
        main(argv)
    assert "that run had --processes 1, this one has 2" in capsys.readouterr().err


def test_the_space_for_checkpoints_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(options.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 0))
    for kept, stage in ((1_000, VELOCITY), (3_000, VELOCITY), (3_000, [])):
        argv = ["--checkpointing_steps", "1", "--checkpoints_total_limit", str(kept), "--expert", "low"]
        with pytest.raises(SystemExit):
            main([*argv, *stage, "--student_blocks", "6", "--output_dir", str(tmp_path / "out")])
        asked.append(float(re.findall(r"about ([\d.]+) GB", capsys.readouterr().err)[0]))
    # Each has the weights and Adam's two moments in float32; and those of the critic.
    one = 3 * 4 * 794_848 / 1e9
    assert asked[1] - asked[0] == pytest.approx(2_000 * one, abs=0.15)
    assert asked[2] - asked[1] == pytest.approx(2 * 3_000 * one, abs=0.3)
    assert parse(DOC, []).checkpoints_total_limit == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # layer norm is not fused on CPUs then
def test_the_average_is_kept_in_float32_and_gradients_are_not_clipped_to_nothing(
    tmp_path: Path, prompts: list[str]
) -> None:
    """Where all is computed in bfloat16: an average of that precision would stay where it began."""
    argv = [*SHORT, *prompts, "--samples_per_prompt", "1", "--expert", "low", "--lr_warmup_steps", "0"]
    argv += [
        "--student_dtype",
        "float32",
        "--use_ema",
        "--mixed_precision",
        "bf16",
        "--max_grad_norm",
        "0",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(argv) == 0
    begun = Teacher(str(TINY_WAN)).expert(experts()[1], torch.bfloat16).float().state_dict()
    average = weights(tmp_path / "out", "transformer_2")
    name = "blocks.0.ffn.net.2.weight"
    assert average[name].dtype == torch.float32
    # 1e-3 a step; the decay of weights alone would be a hundred times less.
    assert (average[name] - begun[name]).abs().mean() > 2e-4
    assert (average[name].bfloat16().float() != average[name]).float().mean() > 0.9


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


def test_warnings_and_log_lines_do_not_tear_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("as.torch.has.them")
    logger.addHandler(logging.StreamHandler(sys.stderr))
    with words_above_the_bar():
        warnings.simplefilter("always")
        for _ in tqdm(range(1), "bar"):
            warnings.warn("from the compiler", stacklevel=1)
            logger.warning("of the compiler")
    lines = [line.strip() for line in capsys.readouterr().err.replace("\r", "\n").splitlines()]
    assert any(line.endswith("UserWarning: from the compiler") for line in lines)
    assert "of the compiler" in lines
    assert not any("bar" in line and "compiler" in line for line in lines)
    logger.handlers.clear()


def test_the_curves_are_in_fixed_order_and_every_shown_prompt_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    step = {"task": 1.0, "lr": 0.1, "loss": 3.0, "seconds": 1.0, "velocity": 2.0}
    report.draw_loss({"transformer": [step, step]}, tmp_path / "loss.png")
    (axis,) = figures[0].axes
    assert [line.get_label() for line in axis.lines] == ["loss", "velocity", "task"]
    assert [line.get_color() for line in axis.lines] == ["black", "tab:blue", "tab:orange"]
    assert axis.get_ylabel() == "mean squared error"
    clips = torch.rand(2, 5, 3, 8, 8)
    report.draw_samples({"teacher": clips, "student": clips}, PROMPTS[:2], tmp_path / "samples.png")
    axes = figures[1].axes
    assert [axis.get_ylabel().replace("\n", " ") for axis in axes if axis.get_ylabel()] == PROMPTS[:2]
    assert [axis.get_title() for axis in axes if axis.get_title()] == ["teacher", "student"]
    # Nothing is cut off or written over something else, however long a prompt is and however narrow a clip.
    long = ["a prompt as people write them for Wan, " * 8, PROMPTS[0]]
    report.draw_samples({f"{arm}, 24 steps": clips[:, :1] for arm in ("untrained", "teacher")}, long, tmp_path / "x")
    figure = figures[2]
    figure.canvas.draw()
    texts = [text for axis in figure.axes for text in (axis.title, axis.yaxis.label) if text.get_text()]
    assert "".join(texts[1].get_text().split()) == "".join(long[0].split())
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == 4
    assert all(figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1 for box in boxes)
    assert all(figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1 for box in boxes)
    assert not any(one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[n + 1 :])


def test_every_flag_on_the_pages_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    """And what `--help` recommends is what the page does."""
    with pytest.raises(SystemExit):
        parse(DOC, ["--help"])
    told, root = capsys.readouterr().out, Path(__file__).parents[1]
    example = (root / "docs/example.md").read_text()
    flags = set(re.findall(r"(?<=--)[a-z_0-9]+", example + (root / "docs/distill.md").read_text()))
    of_others = {"help", "paths", "jobs"}  # those of benchmarks
    assert flags - of_others <= set(re.findall(r"^  --([a-z_0-9]+)", told, re.MULTILINE))
    (command,) = (block.text for block in blocks(root / "docs/example.md", "") if "--lora_rank" in block.text)
    words = command.replace("\\", "").split()
    assert " ".join(words) in " ".join(told.replace("\\", "").split())


@pytest.mark.parametrize("package", ["diffusers", "tqdm"])
def test_a_missing_extra_is_named(package: str, tmp_path: Path) -> None:
    (tmp_path / f"{package}.py").write_text(
        f"raise ModuleNotFoundError('No module named {package}', name='{package}')\n"
    )
    command = [sys.executable, "-m", "tiedquiet.distill"]
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"tiedquiet.distill: no module {package}; in a checkout of tiedquiet, "
        "python -m pip install '.[distill]' installs all that the example needs\n"
    )


def test_the_table_has_straight_columns() -> None:
    told = report.table({"teacher": {"adherence": 0.964}, "again": {"adherence": 1.0, "psnr": 100.0}})
    assert told.splitlines() == [
        "|         | adherence |     psnr |",
        "| ------- | --------: | -------: |",
        "| teacher |     96.4% |          |",
        "| again   |    100.0% | 100.0 dB |",
    ]


def test_the_card_of_a_real_teachers_student(tmp_path: Path) -> None:
    args = parse(DOC, ["--pretrained_model_name_or_path", "someone/wan", "--prompts_file", str(tmp_path / "p.txt")])
    args.student_steps, args.student_blocks = 0, 3
    (tmp_path / "student").mkdir()
    output.write_card(Teacher(str(TINY_WAN)), args, {"teacher": {"psnr": 20.0}}, tmp_path)
    card = (tmp_path / "student/README.md").read_text()
    assert "base_model: someone/wan\n---\n" in card
    assert "pipe(prompt, height=480, width=832, num_frames=81, guidance_scale=5.0).frames" in card
    assert "| teacher | 20.0 dB |" in card
    assert str(tmp_path) not in card

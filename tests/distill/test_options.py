"""What is asked for on the command line, and the one line that bad input gets."""

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from tests.distill.running import CHECKPOINT, VELOCITY, run
from tests.pages import blocks
from tiedquiet.distill import options, speed
from tiedquiet.distill.options import parse
from tiedquiet.distill.train import __doc__ as DOC
from tiedquiet.distill.train import main

# On the command line, {bad} being the folder below; and what the one line must tell.
TEACHER = ["--prompts_file", "{bad}/a_file", "--pretrained_model_name_or_path"]
BAD = {
    "no teacher": ([*TEACHER, "{bad}/nothing"], "no pipeline there"),
    "not Wan": ([*TEACHER, "{bad}/image"], "WanImageToVideoPipeline, not a Wan text-to-video pipeline"),
    "half a pipeline": ([*TEACHER, "{bad}/part"], "the pipeline has no vae/"),
    "one expert": ([*TEACHER, "{bad}/one", "--expert", "high"], "has one transformer"),
    "no transformer of one's own": ([*TEACHER, "{bad}/edge"], "has transformer, and a boundary_ratio of 0.875"),
    "no boundary": ([*TEACHER, "{bad}/two"], "has transformer and transformer_2, and a boundary_ratio of None"),
    "no such encoder": ([*TEACHER, "{bad}/encoder"], "its text_encoder is a Nonsense"),
    "a torn configuration": ([*TEACHER, "{bad}/config"], "transformer/config.json: cannot be read: Expecting"),
    "transformers of two forms": ([*TEACHER, "{bad}/unlike"], "its two transformers differ in num_layers"),
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
    "no such tracker": (["--report_to", "paper"], "--report_to paper: no such tracker is installed; there are "),
    "warm-up": (["--lr_warmup_steps", "-1"], "-1 is not at least 0"),
    "other steps": (["--num_inference_steps", "5"], "--num_inference_steps 5: must be a multiple of --student_steps"),
    "paths of clips": (["--student_steps", "4", "--train_data_dir", "{bad}/jsonl"], "the teacher's own paths"),
    "a task of paths": (["--student_steps", "4", "--task_weight", "0.1"], "it has no --task_weight"),
    "guided twice": (["--student_steps", "4", "--guidance_scale", "2"], "--sample_guidance_scale guides"),
    "too often": ([*VELOCITY, "--empty_prompt_probability", "2"], "--empty_prompt_probability 2.0: is more than 1"),
    "no metadata": (["--train_data_dir", "{bad}/none"], "has neither metadata.jsonl nor metadata.csv"),
    "no caption": (["--train_data_dir", "{bad}/jsonl"], "row 1 needs file_name and text"),
    "a list for a row": (["--train_data_dir", "{bad}/list"], "list/metadata.jsonl: row 2 needs file_name and text, both texts; it is [1]"),
    "a number for a name": (["--train_data_dir", "{bad}/number"], 'number/metadata.jsonl: row 1 needs file_name and text, both texts; it is {"file_name": 5'),
    "no JSON": (["--train_data_dir", "{bad}/broken"], "metadata.jsonl: "),
    "no such clip": (["--train_data_dir", "{bad}/absent"], "row 1: no file"),
    "a comma": (["--train_data_dir", "{bad}/comma"], "row 1 has more columns than names; a text with a comma goes in quotes: a cat"),
    "a quote": (["--train_data_dir", "{bad}/quote"], "quote/metadata.csv: unexpected end of data"),
    "half a character": (["--train_data_dir", "{bad}/halves"], "row 1 needs file_name and text, both texts"),
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
    "a moment": (["--adam_beta2", "1"], "--adam_beta2: 1 is not a number from 0 to below 1"),
    "a seed": (["--seed", "-1"], "--seed: -1 is not from 0 to 4294967295"),
    "a rate below the end": (["--lr_scheduler", "polynomial", "--learning_rate", "0"], "--learning_rate does not begin above it"),
    "bytes": (["--validation_prompts", "caf\udce9"], "'caf\\udce9': is not UTF-8"),
    "unknown flag": (["--blocks", "3"], "unrecognized arguments"),
    "another run": (["--output_dir", "{bad}/run", "--resume_from_checkpoint", "latest"], "that run had --seed 7"),
    "another run's path": (["--resume_from_checkpoint", "{bad}/run/" + CHECKPOINT], "that run had --seed 7, this one has 0"),
    "no checkpoint": (["--resume_from_checkpoint", "{bad}/nothing"], "no checkpoint of transformer or"),
    "no args.json": (["--resume_from_checkpoint", "{bad}/lost/" + CHECKPOINT], "to compare with"),
    "no folder of a run": (["--resume_from_checkpoint", "/"], "no checkpoint of transformer or"),
    "no run to export": (["--export", "/"], "no checkpoint there, such as"),
    "settings lost": (["--output_dir", "{bad}/lost", "--resume_from_checkpoint", "latest"], "lost/args.json cannot be read"),
    "unfinished": (["--output_dir", "{bad}/lost"], "an unfinished run"),
}  # fmt: skip


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
        assert "short.png: has 1 frames at 16 a second, --num_frames is 5" in err
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


def test_the_videos_of_a_real_teacher_need_ffmpeg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run is not to find that out at its end."""
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["--pretrained_model_name_or_path", str(options.TINY_WAN), "--output_dir", str(tmp_path / "out")])
    assert capsys.readouterr().err.endswith("pip install 'imageio[ffmpeg]'\n")
    assert not (tmp_path / "out").exists()


def test_every_flag_on_the_pages_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    """And what `--help` recommends is what the page does."""
    with pytest.raises(SystemExit):
        parse(DOC, ["--help"])
    told, root = capsys.readouterr().out, Path(__file__).parents[2]
    example = (root / "docs/example.md").read_text()
    flags = set(re.findall(r"(?<=--)[a-z_0-9]+", example + (root / "docs/distill.md").read_text()))
    of_others = {"help", "paths", "jobs", "rounds", "scaling", "seeds", "students"}  # those of benchmarks
    assert flags - of_others <= set(re.findall(r"^  --([a-z_0-9]+)", told, re.MULTILINE))
    (command,) = (block.text for block in blocks(root / "docs/example.md", "") if "--lora_rank" in block.text)
    words = command.replace("\\", "").split()
    assert " ".join(words) in " ".join(told.replace("\\", "").split())


def test_what_has_no_effect_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parse(DOC, ["--ema_decay", "0.9", "--critic_steps=3", "--distribution_matching_steps", "0", "--seed", "3"])
    assert capsys.readouterr().err.splitlines() == [
        "tiedquiet.distill: --critic_steps: without effect; needs --distribution_matching_steps",
        "tiedquiet.distill: --ema_decay: without effect; needs --use_ema",
    ]
    parse(DOC, ["--use_ema", "--ema_decay", "0.9", "--critic_steps", "3", "--validation_steps", "1"])
    monkeypatch.setenv("RANK", "1")
    parse(DOC, ["--ema_decay", "0.9"])
    assert capsys.readouterr().err == ""
    # Each is an option, and has an effect somewhere.
    flags = {"max_train_steps": 0, "train_data_dir": "x", "lora_rank": 0, "student_steps": 0, "use_ema": True}
    args, all_idle = parse(DOC, []), set[str]()
    for name, value in flags.items():
        idle = {name for names in options.idle(Namespace(**{**vars(args), name: value})).values() for name in names}
        assert idle < set(vars(args))
        all_idle |= idle
    assert {"ema_decay", "learning_rate", "critic_steps", "samples_per_prompt", "caption_column"} < all_idle


def test_wan_is_led_away_from_its_own_negative_prompt() -> None:
    assert parse(DOC, []).negative_prompt == ""
    wan = ["--pretrained_model_name_or_path", "someone/wan"]
    assert "过曝" in parse(DOC, wan).negative_prompt
    assert parse(DOC, [*wan, "--negative_prompt", "mine"]).negative_prompt == "mine"


@pytest.mark.parametrize("teacher", [[], ["--pretrained_model_name_or_path", "wan"]])
def test_adapters_learn_three_times_as_fast_unless_told_otherwise(teacher: list[str]) -> None:
    whole, adapters = parse(DOC, teacher), parse(DOC, [*teacher, "--lora_rank", "8", "--critic_learning_rate", "0.5"])
    assert adapters.learning_rate == 3 * whole.learning_rate
    assert adapters.matching_learning_rate == 3 * whole.matching_learning_rate
    assert adapters.critic_learning_rate == 0.5

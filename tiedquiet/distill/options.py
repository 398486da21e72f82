"""The settings, named as in diffusers' training examples, and every check that needs no weights."""
# ruff: noqa: RUF001 - Wan's negative prompt has the commas of Chinese

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm


def is_main_process() -> bool:
    """Whether this process is the first of a distributed launch, or not part of one."""
    return os.environ.get("RANK", "0") in ("", "0")


TINY_WAN = Path(__file__).with_name("tiny") / "wan"
# The one that Wan's authors sample it with: `sample_neg_prompt` in wan/configs/shared_config.py of Wan2.1 and Wan2.2.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
# What a run does when it is told nothing: with the teacher that ships with the package, and with a real one.
TINY = {
    "height": 64, "width": 64, "num_frames": 5, "max_sequence_length": 16, "num_inference_steps": 24,
    "sample_guidance_scale": 3.0, "train_batch_size": 32, "max_train_steps": 600,
    "learning_rate": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 50, "samples_per_prompt": 40,
    "matching_learning_rate": 1e-4, "critic_learning_rate": 4e-4, "negative_prompt": "",
    "mixed_precision": "no",
}  # fmt: skip
WAN = {
    "height": 480, "width": 832, "num_frames": 81, "max_sequence_length": 512, "num_inference_steps": 48,
    "sample_guidance_scale": 5.0, "train_batch_size": 1, "max_train_steps": 10_000,
    "learning_rate": 1e-5, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 500, "samples_per_prompt": 1,
    "matching_learning_rate": 2e-6, "critic_learning_rate": 1e-5, "negative_prompt": NEGATIVE,
    "mixed_precision": "bf16",
}  # fmt: skip
# With adapters the rates are three times these: of 1, 3, 10 and 30 times, at ranks 8, 16 and 64, that was the most at
# which no student drew worse than with less (benchmarks/distill/rates.py).
RATES, ADAPTERS_RATES = ("learning_rate", "matching_learning_rate", "critic_learning_rate"), 3
# May differ between a run and its continuation; everything else must be as it was.
FREE_ON_RESUME = {
    "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit", "validation_steps",
    "validation_prompts", "report_to", "compile", "plan", "show_broken_tie", "output_dir", "cache_dir",
    "student_dtype", "standalone", "export", "samples",
}  # fmt: skip

MAY_GROW = {"max_train_steps", "distribution_matching_steps"}


def fail(message: str) -> NoReturn:
    """Say in one line what is wrong, once in a distributed run, and end with status 2."""
    if not is_main_process():
        time.sleep(5)  # if the first process fails, too, the launcher ends this one before it says the same
    tqdm.write(f"tiedquiet.distill: {message}", file=sys.stderr)  # on a line of its own, whatever bar is shown
    raise SystemExit(2)


class OneLine(argparse.ArgumentParser):
    """Errors in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Report what argparse found wrong."""
        fail(message)


def positive(text: str) -> int:
    """An integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def count(text: str) -> int:
    """An integer of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is not at least 0")
    return number


def weight(text: str) -> float:
    """A number that is not negative."""
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return number


def share(text: str) -> float:
    """A number from 0 to below 1, as AdamW and a moving average want it."""
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to below 1")
    return number


def seed(text: str) -> int:
    """An integer that numpy and torch both take."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{number} is not from 0 to 4294967295")
    return number


def parse(doc: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; with no teacher named, the defaults are those of the tiny one.

    Raises:
        SystemExit: with status 2, after one line, for anything that cannot be used.
    """
    words = sys.argv[1:] if argv is None else argv
    for word in words:  # it would end a run where it is printed or hashed
        if word != word.encode("utf-8", "ignore").decode():
            fail(f"{word!a}: is not UTF-8")
    parser = OneLine(
        prog="tiedquiet.distill",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    # What is distilled, into what.
    add("--pretrained_model_name_or_path", metavar="TEACHER", help="a Wan text-to-video pipeline: folder or hub name")
    add("--revision", help="revision of the teacher on the hub")
    add("--output_dir", type=Path, default=Path("distilled"), help="student/, pictures, metrics.json, args.json")
    add("--expert", choices=["high", "low", "both"], default="both", help="Wan2.2: which experts get a student")
    add("--student_steps", type=count, metavar="N",
        help="a student that draws a clip in N unguided steps, learnt from the guided teacher's paths; 0: one that "
        "learns the teacher's velocity and takes as many steps (default: 2; 0 with --train_data_dir)")  # fmt: skip
    add("--student_blocks", type=positive,
        help="blocks per student (default: all the teacher's; half to learn its velocity)")  # fmt: skip
    add("--lora_rank", type=count, default=0, metavar="R",
        help="train adapters of rank R on the frozen teacher (LoRA) instead of a whole student; WanPipeline's "
        "load_lora_weights reads the result")  # fmt: skip
    add("--student_dtype", choices=["bfloat16", "float32"], default="bfloat16",
        help="data type to write the student in; it is trained in float32 (default: bfloat16)")  # fmt: skip
    add("--standalone", action="store_true",
        help="copy the weights that were not trained, text encoder and VAE, instead of linking them")  # fmt: skip
    add("--repair_ties", "--repair-ties", action="store_true", help="tie what the text encoder left untied, and go on")
    add("--show_broken_tie", "--show-broken-tie", action="store_true", help="also sample with the tie broken")
    # The second stage.
    add("--distribution_matching_steps", type=count, metavar="N", help="with --student_steps, afterwards: N updates of "
        "DMD2 for each expert, with the student's own states, the guided teacher and a critic (default: 500; with the "
        "tiny teacher 300)")  # fmt: skip
    add("--segment_weight", type=weight, default=0.25,
        help="weight of the first stage's loss in the second (default: 0.25)")  # fmt: skip
    add("--critic_steps", type=positive, default=2, help="steps of the critic for each of the student's (default: 2)")
    add("--matching_learning_rate", type=weight, help="learning rate of the student in the second stage")
    add("--critic_learning_rate", type=weight)
    # Data: a folder of clips, or latents that the teacher samples for prompts.
    add("--train_data_dir", type=Path, help="clips or images with metadata.jsonl or metadata.csv: file_name, text")
    add("--caption_column", default="text", help="column of the metadata with the prompt")
    add("--prompts_file", type=Path,
        help="one prompt a line; the teacher samples for them (default: 500 that ship with the package; with "
        "the tiny teacher its 48)")  # fmt: skip
    add("--samples_per_prompt", type=positive, help="latents that the teacher samples for each prompt")
    add("--negative_prompt", help="what guidance steers away from (default: Wan's own; with the tiny teacher none)")
    add("--cache_dir", type=Path, help="prompt embeddings, paths and latents (default: OUTPUT_DIR/cache)")
    add(
        "--flow_shift",
        type=weight,
        help="shift of the noise schedule, instead of the teacher's: higher takes more steps early",
    )
    for name in ("height", "width", "num_frames", "max_sequence_length", "num_inference_steps"):
        add(f"--{name}", type=positive)
    add("--sample_guidance_scale", type=weight, help="classifier-free guidance when the teacher samples; 1 is none")
    add("--sample_guidance_scale_2", type=weight, help="that of Wan2.2's low-noise expert (default: the same)")
    # The loss.
    add("--task_weight", type=weight,
        help="weight of the extra loss against noise - x0 (default: 0.05; 0 where guidance is distilled)")  # fmt: skip
    add("--guidance_scale", type=weight, default=1.0, help="above 1: distil the guided teacher; the student needs none")
    add("--empty_prompt_probability", type=weight, default=0.1,
        help="how often a student that is sampled with guidance sees the negative prompt")  # fmt: skip
    # The steps.
    add("--train_batch_size", type=positive, help="batch size per process and accumulation step")
    add("--gradient_accumulation_steps", type=positive, default=1)
    add("--max_train_steps", type=count,
        help="optimizer steps of the first stage for each expert; a resumed run may have more")  # fmt: skip
    add("--learning_rate", type=weight)
    add("--lr_scheduler", choices=["linear", "cosine", "polynomial", "constant", "constant_with_warmup"])
    add("--lr_warmup_steps", type=count, help="of the first stage; the second has none")
    add("--adam_beta1", type=share, default=0.9, help="in the first stage; 0 in the second")
    add("--adam_beta2", type=share, default=0.99)
    add("--adam_weight_decay", type=weight, default=0.01)
    add("--max_grad_norm", type=weight, default=1.0, help="0: gradients are not clipped")
    add("--use_ema", action="store_true", help="the student is the moving average of its weights")
    add("--ema_decay", type=share, default=0.999)
    add("--seed", type=seed, default=0)
    # Memory and speed.
    add("--mixed_precision", choices=["no", "bf16"],
        help="bf16: compute in it, teacher stored in it (default: bf16; with the tiny teacher no)")  # fmt: skip
    add("--gradient_checkpointing", nargs="?", choices=["blocks", "attention"], const="blocks",
        help="recompute the student's blocks in the backward pass; attention: all but attention")  # fmt: skip
    add("--teacher_attention", choices=["native", "float8"], default="native",
        help="float8: self-attention's products in 8 bits, in its paths and, without --lora_rank, in training; needs "
        "a Hopper GPU and the package fa3-fwd")  # fmt: skip
    add("--compile", action="store_true", help="compile the blocks of teacher and student, for paths and training")
    # The run.
    add("--plan", action="store_true", help="only say what the run would take: paths, hours, memory, disk")
    add("--checkpointing_steps", type=positive, help="save a checkpoint every so many steps, and keep them when done")
    add("--checkpoints_total_limit", type=positive, default=2,
        help="checkpoints to keep of each stage of each expert; the oldest are deleted")  # fmt: skip
    add("--resume_from_checkpoint", metavar="latest|PATH", help="continue where a run with the same settings stopped")
    add("--export", type=Path, metavar="CHECKPOINT",
        help="only write what a run's checkpoint holds as OUTPUT_DIR/student; nothing is trained")  # fmt: skip
    add("--validation_steps", type=positive, help="sample --validation_prompts every so many steps")
    add("--validation_prompts", nargs="+", default=[])
    add("--report_to", help="a tracker that accelerate knows: tensorboard, wandb, ...")

    known = parser.parse_known_args(words)[0]
    tiny = known.pretrained_model_name_or_path is None
    parser.set_defaults(**(TINY | {"pretrained_model_name_or_path": str(TINY_WAN)} if tiny else WAN))
    if known.lora_rank:
        parser.set_defaults(**{rate: parser.get_default(rate) * ADAPTERS_RATES for rate in RATES})
    args = parser.parse_args(words)
    args.tiny = tiny
    if args.student_steps is None:
        args.student_steps = 0 if args.train_data_dir else 2
    if args.distribution_matching_steps is None:
        args.distribution_matching_steps = (300 if tiny else 500) if args.student_steps else 0
    args.cache_dir = args.cache_dir or args.output_dir / "cache"
    given = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    for need, names in idle(args).items():
        if is_main_process() and (unused := sorted(given & set(names))):
            print(f"tiedquiet.distill: --{', --'.join(unused)}: without effect; needs {need}", file=sys.stderr)
    return args


def idle(args: argparse.Namespace) -> dict[str, list[str]]:
    """The options that change nothing in a run with these settings, by what they would need."""
    second = ["segment_weight", "critic_steps", "matching_learning_rate", "critic_learning_rate"]
    used = {
        "--distribution_matching_steps": ("matching" in stages(args), second),
        "--max_train_steps": (stages(args) != ["matching"], ["learning_rate", "lr_warmup_steps", "adam_beta1"]),
        "--use_ema": (args.use_ema, ["ema_decay"]),
        "--validation_steps": (args.validation_steps, ["validation_prompts"]),
        "--train_data_dir": (args.train_data_dir, ["caption_column"]),
        "prompts instead of clips": (not args.train_data_dir, ["samples_per_prompt"]),
        "--student_steps 0": (not args.student_steps, ["empty_prompt_probability"]),
        "a whole student, without --lora_rank": (not args.lora_rank, ["standalone"]),
        "a teacher on the hub": (not Path(args.pretrained_model_name_or_path).is_dir(), ["revision"]),
    }
    return {need: names for need, (is_used, names) in used.items() if not is_used}


def stages(args: argparse.Namespace) -> list[str]:
    """What each expert's student goes through."""
    if not args.student_steps:
        return ["velocity"]
    return ["segments"] * bool(args.max_train_steps) + ["matching"] * bool(args.distribution_matching_steps)


def steps_of(args: argparse.Namespace, stage: str) -> int:
    """How many steps each expert's student takes in a stage."""
    return int(args.distribution_matching_steps if stage == "matching" else args.max_train_steps)


def needs_paths(args: argparse.Namespace) -> bool:
    """Whether samples are kept: distribution matching alone needs prompts and nothing else."""
    return bool(not args.student_steps or args.max_train_steps or args.segment_weight or args.expert == "low")


def check(args: argparse.Namespace, index: dict[str, Any], transformer: dict[str, Any], vae: dict[str, Any]) -> None:
    """Compare the settings with the teacher's configurations, and fill in what follows from them.

    Args:
        args: as parsed; `student_blocks` is filled in.
        index: the pipeline's `model_index.json`.
        transformer: the configuration of one expert.
        vae: the configuration of the VAE.

    Raises:
        SystemExit: with status 2, after one line.
    """
    name = args.pretrained_model_name_or_path
    one = index.get("boundary_ratio") is None
    if args.expert != "both" and one:
        fail(f"--expert {args.expert}: {name} has one transformer, not a high- and a low-noise expert")
    blocks = transformer["num_layers"]
    args.student_blocks = args.student_blocks or (blocks if args.student_steps else max(1, blocks // 2))
    if args.student_blocks > blocks:
        fail(f"--student_blocks {args.student_blocks}: the teacher has {blocks}")
    time, space = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
    if args.num_frames % time != 1:
        lower = (args.num_frames - 1) // time * time + 1
        fail(f"--num_frames {args.num_frames}: the VAE takes {time}k+1 frames, such as {lower} or {lower + time}")
    for side, patch in zip(("height", "width"), transformer["patch_size"][1:], strict=True):
        # WanPipeline itself wants multiples of 16.
        if getattr(args, side) % (multiple := max(16, space * patch)):
            fail(f"--{side} {getattr(args, side)}: must be a multiple of {multiple}")
    if args.task_weight is None:
        args.task_weight = 0.0 if args.student_steps or args.guidance_scale > 1 else 0.05
    if args.student_steps:
        if args.num_inference_steps % args.student_steps:
            fail(f"--num_inference_steps {args.num_inference_steps}: must be a multiple of --student_steps")
        if args.train_data_dir:
            fail("--student_steps learns from the teacher's own paths: use --prompts_file instead of --train_data_dir")
        if args.task_weight or args.guidance_scale > 1:
            fail("--student_steps learns guided paths: it has no --task_weight, and --sample_guidance_scale guides")
        if not stages(args):
            fail("--max_train_steps 0 and no --distribution_matching_steps: nothing would be learnt")
    elif args.flow_shift is not None:
        fail("--flow_shift is for a student of few steps, whose folder has a scheduler of its own: --student_steps")
    elif args.distribution_matching_steps or not args.max_train_steps:
        fail("--distribution_matching_steps, and --max_train_steps 0, are for a student of few steps: --student_steps")
    if args.lora_rank:
        if args.student_blocks != blocks:
            fail("--lora_rank: adapters sit on all the teacher's blocks; leave --student_blocks out")
        if not args.student_steps:
            fail("--lora_rank: is for a student of few steps; use --student_steps 2, 4 or 8")
    if args.lr_scheduler == "polynomial" and (low := [rate for rate in RATES if getattr(args, rate) <= 1e-7]):
        fail(f"--lr_scheduler polynomial: ends at a rate of 1e-7, and --{low[0]} does not begin above it")
    if args.empty_prompt_probability > 1:
        fail(f"--empty_prompt_probability {args.empty_prompt_probability}: is more than 1")
    if args.flow_shift == 0:
        fail("--flow_shift 0: must be above 0; 3 to 12 are usual")
    if one and args.sample_guidance_scale_2 is not None:
        fail(f"--sample_guidance_scale_2: {name} has one transformer, which --sample_guidance_scale guides")
    if not one and args.sample_guidance_scale_2 is None:
        args.sample_guidance_scale_2 = args.sample_guidance_scale
    scales = (args.guidance_scale, args.sample_guidance_scale, args.sample_guidance_scale_2)
    if any(scale is not None and scale < 1 for scale in scales):
        fail("--guidance_scale, --sample_guidance_scale and its _2: 1 is no guidance, less has no meaning")
    if not one and args.sample_guidance_scale == 1 < args.sample_guidance_scale_2:
        fail("--sample_guidance_scale_2: WanPipeline guides both experts or none, and --sample_guidance_scale is 1")
    if args.validation_steps and not args.validation_prompts:
        fail("--validation_steps needs --validation_prompts")
    if args.train_data_dir and args.prompts_file:
        fail("--train_data_dir and --prompts_file: the clips have their own prompts; choose one")
    for folder in (args.output_dir, args.cache_dir):
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            fail(f"{there}: is a file, not a folder")
    if not args.tiny and not find_spec("imageio_ffmpeg"):  # at full size the last thing that a run writes is an mp4
        fail("no ffmpeg for imageio, which writes the videos: pip install 'imageio[ffmpeg]'")
    if args.report_to and args.report_to not in (trackers := available_trackers()):
        fail(f"--report_to {args.report_to}: no such tracker is installed; there are {', '.join(trackers)}")


def available_trackers() -> list[str]:
    """The names of the trackers that accelerate can use here."""
    from accelerate.tracking import get_available_trackers

    return [tracker.value for tracker in get_available_trackers()]


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings as `args.json` holds them."""
    told = {key: str(value) if isinstance(value, Path) else value for key, value in sorted(vars(args).items())}
    return {**told, "processes": int(os.environ.get("WORLD_SIZE", "1"))}


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Where to write a file: beside its place, to which it goes when it is whole. Another process may write it, too."""
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def put(made: Path, place: Path) -> None:
    """Move a folder that is whole to its place; an older one there goes, and is never there in part."""
    old = place.with_name(f".part-old-{place.name}")
    if place.exists():
        place.rename(old)
    made.replace(place)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text, complete or not at all."""
    with beside(path) as part:
        part.write_text(text, encoding="utf-8")


def must_match(args: argparse.Namespace, before: Path) -> bool:
    """Stop unless the run that wrote `before` (its `args.json`) had the same settings, in as many processes.

    Returns:
        Whether there are more steps than there were; fewer there cannot be.

    Raises:
        SystemExit: with status 2, after one line.
    """
    try:
        then = dict(json.loads(before.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        fail(f"--resume_from_checkpoint: {before} cannot be read ({error}), so the settings of that run are unknown")
    now = settings(args)
    if then.get("samples", now.get("samples")) != now.get("samples"):  # those of older releases do not tell
        fail("--resume_from_checkpoint: that run had other prompts or clips; their file was changed since")
    grown = False
    for key in sorted(now.keys() - FREE_ON_RESUME):
        was = then.get(key)
        if key in MAY_GROW and isinstance(was, int) and was <= now[key]:
            grown |= was < now[key]
        elif was != now[key]:
            only = "; it may only grow" if key in MAY_GROW else ""
            fail(f"--resume_from_checkpoint: that run had --{key} {was}, this one has {now[key]}{only}")
    return grown

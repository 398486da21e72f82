r"""Distil a Wan text-to-video pipeline into a student that draws a clip in four unguided steps, or with fewer blocks.

    python -m tiedquiet.distill                                  # a tiny teacher that ships with the package, on a CPU
    python -m tiedquiet.distill --show_broken_tie                # and what a broken tie does to it

    python -m tiedquiet.distill \
        --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --prompts_file prompts.txt --output_dir wan-4-steps --student_steps 4 --student_blocks 15 \
        --mixed_precision bf16 --gradient_checkpointing attention --compile \
        --checkpointing_steps 500 --resume_from_checkpoint latest

    accelerate launch -m tiedquiet.distill ...                   # more GPUs, more machines
    accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \
        --fsdp_transformer_layer_cls_to_wrap WanTransformerBlock -m tiedquiet.distill \
        --pretrained_model_name_or_path Wan-AI/Wan2.2-T2V-A14B-Diffusers --expert high ...

Down the page: the text encoder's ties are proven and the prompt embeddings cached. With --student_steps N the guided
teacher's paths are cached at N + 1 nodes, and each expert's student learns the segments that start on its side;
without it, latents are encoded from clips (--train_data_dir) or sampled by the teacher (--prompts_file), and each
student learns the teacher's velocity. Then the student is written as a pipeline folder that WanPipeline loads.
"""

import json
import os
import shutil
import signal
import sys
import time
from argparse import Namespace
from datetime import timedelta
from functools import partial
from pathlib import Path

from tiedquiet.distill.options import check, fail, must_match, parse, settings, write_text


def resume_from(args: Namespace, experts: list[str]) -> dict[str, Path | None]:
    """For each expert the checkpoint to go on from, or None.

    Raises:
        SystemExit: with status 2, after one line, where an unfinished run would be lost or does not match.
    """
    from tiedquiet.distill.train import checkpoints

    work, wanted = args.output_dir / "checkpoints", args.resume_from_checkpoint
    if wanted is None:
        if work.exists():
            fail(
                f"{work}: an unfinished run; --resume_from_checkpoint latest goes on, another --output_dir begins anew"
            )
        if (args.output_dir / "student").exists():
            fail(f"{args.output_dir / 'student'} is finished; choose another --output_dir, or delete it yourself")
        return dict.fromkeys(experts)
    if (args.output_dir / "args.json").exists() and (work.exists() or (args.output_dir / "student").exists()):
        must_match(args, args.output_dir / "args.json")
    if wanted == "latest":
        return {name: [None, *checkpoints(work / name)][-1] for name in experts}
    place = Path(wanted)
    if not place.is_dir() or place.parent.name not in experts:
        fail(f"--resume_from_checkpoint {wanted}: no checkpoint of {' or '.join(experts)} there")
    if not (settings_file := place.parents[2] / "args.json").exists():
        fail(f"--resume_from_checkpoint {wanted}: no {settings_file} to compare with")
    must_match(args, settings_file)
    return {name: place if name == place.parent.name else None for name in experts}


def main(argv: list[str] | None = None) -> int:
    """Run it; returns the exit status."""
    start = time.perf_counter()
    args = parse(__doc__, argv)
    # Only now what takes seconds to import.
    import diffusers
    import transformers
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, set_seed

    from tiedquiet.distill.cache import Data, read_metadata, read_prompts
    from tiedquiet.distill.judge import Judge
    from tiedquiet.distill.speed import check_float8
    from tiedquiet.distill.student import check_space, write_pipeline
    from tiedquiet.distill.teacher import Teacher, compute_dtype
    from tiedquiet.distill.train import Progress, Stopped, train

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # those of loading; ours remain
    teacher = Teacher(args.pretrained_model_name_or_path, args.revision)
    check(args, teacher.index, teacher.transformer, teacher.vae)
    if args.teacher_attention == "float8":
        check_float8()
    experts = {"high": teacher.experts[:1], "low": teacher.experts[1:], "both": teacher.experts}[args.expert]
    names = [expert.name for expert in experts]
    clips = read_metadata(args) if args.train_data_dir else []
    prompts = [text for _, text in clips] or read_prompts(args)
    out, work = args.output_dir, args.output_dir / "checkpoints"
    resume = resume_from(args, names)
    if args.resume_from_checkpoint and not work.exists() and (out / "student").exists():
        print(f"{out / 'student'} is finished")
        return 0
    share = args.student_blocks / teacher.transformer["num_layers"]
    check_space(teacher, names, share, out, args.checkpoints_total_limit + 1 if args.checkpointing_steps else 1)

    # Under FSDP, transformers would leave the text encoder empty in all processes but the first.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        # The others wait while one writes and samples; torch gives up on them after ten minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "logs")),
    )
    if accelerator.distributed_type is DistributedType.FSDP:
        if args.use_ema or args.validation_steps:
            fail("--use_ema and --validation_steps need whole weights on one GPU; under FSDP no GPU has them")
        if not accelerator.is_fsdp2:
            fail("FSDP 1 would round the timesteps that it hands in: accelerate launch --fsdp_version 2")
    dtype = compute_dtype(args)
    set_seed(args.seed)
    told = settings(args)
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "args.json", json.dumps(told, indent=1) + "\n")
    accelerator.wait_for_everyone()
    accelerator.init_trackers("tiedquiet-distill", {k: v for k, v in told.items() if isinstance(v, int | float | str)})

    data = Data(args, prompts, [path for path, _ in clips])
    data.prepare(teacher, accelerator, dtype)
    judge = Judge(teacher, data, accelerator.device, dtype)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    for expert in experts:
        if not (work / expert.name / "student").exists():
            validate = partial(judge.validate, expert.name)
            try:
                train(
                    args,
                    accelerator,
                    teacher,
                    expert,
                    data,
                    work / expert.name,
                    resume[expert.name],
                    progress,
                    validate,
                )
            except Stopped as stopped:
                accelerator.end_training()
                accelerator.print(f"tiedquiet.distill: {stopped}", file=sys.stderr)
                return 128 + stopped.number

    if accelerator.is_main_process:
        try:
            if not (out / "student").exists():  # it does where an earlier run was interrupted later than this
                trained = {name: work / name / "student" for name in names}
                write_pipeline(teacher, trained, out / "student", args.student_steps)
            metrics = judge.report(experts)
        except KeyboardInterrupt:
            done = "the student is complete" if (out / "student").exists() else "training is complete"
            print(f"tiedquiet.distill: interrupted; {done}; --resume_from_checkpoint latest finishes", file=sys.stderr)
            return 128 + signal.SIGINT
        metrics |= {"processes": accelerator.num_processes, "distributed": accelerator.distributed_type.value}
        metrics["seconds"] = round(time.perf_counter() - start, 1)
        write_text(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        shutil.rmtree(work)
        print(f"student: {out / 'student'} ({metrics['seconds']:.0f} s); beside it pictures, metrics.json, args.json")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def run() -> int:
    """`main`, with one line instead of a traceback where the world is not as it should be; returns the exit status."""
    try:
        return main()
    except KeyboardInterrupt:  # outside training, which saves a checkpoint
        print("tiedquiet.distill: interrupted; what was cached stays", file=sys.stderr)
        return 128 + signal.SIGINT
    except ModuleNotFoundError as error:
        fail(f"no module {error.name}; pip install 'tiedquiet[distill]'")
    except OSError as error:  # a full or read-only disk, at any moment
        fail(f"{error.filename or 'the disk'}: {error.strerror or error}")


if __name__ == "__main__":
    sys.exit(run())

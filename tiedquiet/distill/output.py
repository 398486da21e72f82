"""The student's folder: written at the end of a run, or from any of its checkpoints; and its model card."""

import errno
import json
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate.utils import merge_fsdp_weights
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from tiedquiet.distill.checkpoint import alone_in
from tiedquiet.distill.lora import FILE, write_lora
from tiedquiet.distill.options import fail, stages, write_text
from tiedquiet.distill.pipeline import NO_GUIDANCE, Teacher, assembled, few_steps, guidance, readable, save_weights
from tiedquiet.distill.report import table

PLACES = ("output_dir", "cache_dir", "prompts_file", "train_data_dir", "export")  # nobody else's business
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def link_weights(source: str, place: str) -> str:
    """For `copytree`: a file of weights becomes a hard link, across file systems a symbolic one; others are copied."""
    if Path(source).suffix not in (".safetensors", ".bin"):
        return str(shutil.copy2(source, place))
    file = Path(source).resolve()  # the hub's cache has links of its own
    try:
        os.link(file, place)
    except OSError:
        os.symlink(file, place)
    return place


def write_pipeline(args: Namespace, teacher: Teacher, trained: Mapping[str, Path], target: Path) -> None:
    """Write the whole pipeline beside `target` and move it into place, so that there is never half a student.

    What was not trained is the teacher's: its weights are linked, with `--standalone` copied. Of adapters, the folder
    has these, and the scheduler of their steps: they go with the teacher.

    Its text encoder is the teacher's, with a config that says that its embedding is tied: the tie was proven before the
    first embedding was made, and transformers 5.0 to 5.2 would leave it untied otherwise.

    Args:
        args: the settings; a student of few steps gets a scheduler that takes them.
        teacher: everything but the trained experts comes from there.
        trained: the folders of the trained experts, by the names of the teacher's.
        target: the folder to make.

    Raises:
        FileExistsError: `target` is there already; nothing is written.
    """
    if target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    dtype, copy = DTYPES[args.student_dtype], shutil.copy2 if args.standalone else link_weights
    with tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent) as beside:
        made = Path(beside) / target.name
        made.mkdir()
        if args.student_steps:
            few_steps(teacher.scheduler, args.student_steps).save_pretrained(made / "scheduler")
        if args.lora_rank:
            write_lora(trained, made, dtype)
            made.rename(target)
            return
        index = dict(teacher.index)
        if args.student_steps:
            index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
        for name in teacher.parts:
            if name in trained:  # what Wan keeps in float32 stays so
                WanTransformer3DModel.from_pretrained(trained[name], dtype=dtype).save_pretrained(made / name)
            elif not (made / name).exists():
                shutil.copytree(teacher.folder / name, made / name, copy_function=copy)
        write_text(made / "model_index.json", json.dumps(index, indent=2) + "\n")
        config = made / "text_encoder" / "config.json"
        told = json.loads(config.read_text())
        if told.get("tie_word_embeddings") is False:
            write_text(config, json.dumps({**told, "tie_word_embeddings": True}, indent=2) + "\n")
        made.rename(target)


def export(args: Namespace) -> int:
    """Write the student that a checkpoint holds to `OUTPUT_DIR/student`, without training; returns the exit status.

    Its run's `args.json` says what it is. Another expert is as that run has left it so far: the student of the last
    stage that it finished, else the teacher's.

    Raises:
        SystemExit: with status 2, after one line, where there is no such checkpoint, or a student already.
    """
    place, target = args.export.absolute(), args.output_dir / "student"
    of = [place / "custom_checkpoint_0.pkl", *(folder / "args.json" for folder in place.parents[3:4])]
    if len(of) < 2 or not all(file.exists() for file in of):
        fail(f"--export {args.export}: no checkpoint there, such as RUN/checkpoints/EXPERT/STAGE/checkpoint-100")
    work, expert, stage = place.parents[2], place.parents[1].name, place.parent.name
    if target.exists() or work.parent.resolve() == args.output_dir.resolve():
        fail(f"--output_dir {args.output_dir}: has a run or a student of its own; choose another to export to")
    run = Namespace(**json.loads((work.parent / "args.json").read_text()))
    run.student_dtype, run.standalone = args.student_dtype, args.standalone
    teacher = Teacher(run.pretrained_model_name_or_path, run.revision, run.flow_shift)
    left = [work / e.name / s / "student" for s in stages(run) for e in teacher.experts]
    trained = {folder.parents[1].name: folder for folder in left if folder.exists()}
    with alone_in(args.output_dir), tempfile.TemporaryDirectory(prefix=".part-", dir=args.output_dir) as beside:
        trained[expert] = Path(beside) / "student"
        with readable(place):
            read_checkpoint(run, teacher, place, trained[expert])
        write_pipeline(run, teacher, trained, target)
    after = f"{expert} at step {place.name.split('-')[-1]} of {stage}"
    others = [
        f"{e.name} as it was after {trained[e.name].parent.name}" if e.name in trained else f"{e.name} the teacher's"
        for e in teacher.experts
        if e.name != expert
    ]
    write_card(teacher, run, {}, args.output_dir, "Exported: " + ", ".join([after, *others]) + ".")
    print(f"student: {target} ({', '.join([after, *others])})")
    return 0


def read_checkpoint(run: Namespace, teacher: Teacher, place: Path, folder: Path) -> None:
    """Write the student of a checkpoint as a stage leaves it: with `--use_ema` the average of its weights.

    Args:
        run: the settings that it was trained with.
        teacher: whose configuration it has, but for the number of blocks.
        place: the checkpoint.
        folder: to make.
    """
    progress = torch.load(place / "custom_checkpoint_0.pkl", map_location="cpu", weights_only=True)
    average = progress["ema"]["shadow_params"] if run.use_ema else None
    if run.lora_rank:
        state = progress["student"]
        folder.mkdir()
        save_file(dict(zip(state, average or state.values(), strict=True)), folder / FILE)
        return
    whole = place / "model.safetensors"
    if (parts := place / "pytorch_model_fsdp_0").exists():
        merge_fsdp_weights(str(parts), str(folder.parent))
        whole = folder.parent / whole.name
    config, state = {**teacher.transformer, "num_layers": run.student_blocks}, load_file(whole)
    if average:
        names = [name for name, _ in assembled(config, state).named_parameters()]
        state = dict(zip(names, average, strict=True))
    save_weights(config, state, folder)


LOAD_LORA = """pipe = WanPipeline.from_pretrained("{teacher}")
pipe.scheduler = UniPCMultistepScheduler.from_pretrained("this folder", subfolder="scheduler")
pipe.load_lora_weights("this folder")"""


COMFYUI = """The names in the files are those of Wan's authors, which diffusers and ComfyUI read."""
LINKED = """The weights of {parts} are the teacher's own files, linked: change them in neither place. `cp -rL` copies
the folder with them; `--standalone` would have written it without links."""
MEASURED = """PSNR is to the first line's clip from the same seed; spread and speed are parts of the first line's;
seconds are of one clip, denoising and decoding apart."""


def write_card(
    teacher: Teacher, args: Namespace, metrics: Mapping[str, Mapping[str, float]], out: Path, note: str = ""
) -> None:
    """Write the student's model card, README.md, in the hub's form, with its pictures beside it.

    Args:
        teacher: says how many blocks there were.
        args: the settings.
        metrics: of each arm, for the table; nothing was measured without them.
        out: the run's folder, which has `student`.
        note: what else is to be said.
    """
    call = f"prompt, height={args.height}, width={args.width}, num_frames={args.num_frames}"
    if args.max_sequence_length != 512:  # the pipeline's own; padded otherwise, a prompt is another one to the student
        call += f", max_sequence_length={args.max_sequence_length}"
    if args.student_steps:
        call += f", num_inference_steps={args.student_steps}"
    scales = NO_GUIDANCE if args.student_steps or args.guidance_scale > 1 else guidance(args)
    call += "".join(f", {name}={scale}" for name, scale in scales.items())
    hidden = {"resume_from_checkpoint", "samples", "show_broken_tie", "tiny", *PLACES}
    on_hub = not Path(args.pretrained_model_name_or_path).is_dir()
    hidden |= set() if on_hub else {"pretrained_model_name_or_path"}
    told = {k: v for k, v in vars(args).items() if k not in hidden and v not in (None, [], False, "")}
    base = f"base_model: {args.pretrained_model_name_or_path}\n" if on_hub else ""  # the hub takes no path
    settings = "\n".join(f"{name}: {value}" for name, value in sorted(told.items()))
    about = [note] if note else []
    linked = [f.parent.name for f in out.glob("student/*/*.*") if f.is_symlink() or f.stat().st_nlink > 1]
    if linked:
        about += [LINKED.format(parts=", ".join(sorted(set(linked))))]
    if metrics:
        pictures = [path for path in sorted(out.glob("samples.*")) if path.suffix in (".png", ".gif")]
        for picture in pictures:
            (out / "student" / picture.name).write_bytes(picture.read_bytes())
        about += [table(metrics), MEASURED, *(f"![{' | '.join(metrics)}]({picture.name})" for picture in pictures)]
    pipe = 'pipe = WanPipeline.from_pretrained("this folder")'
    imports = "UniPCMultistepScheduler, " if args.lora_rank else ""
    of_blocks = f"{args.student_blocks} of the teacher's {teacher.transformer['num_layers']} blocks"
    if args.lora_rank:
        pipe = LOAD_LORA.format(teacher=args.pretrained_model_name_or_path if on_hub else "its teacher")
        if file := next((out / "student").glob("transformer_2_*"), None):
            pipe += f'\npipe.load_lora_weights("this folder", weight_name="{file.name}", load_into_transformer_2=True)'
        of_blocks = f"An adapter of rank {args.lora_rank}"
        about.insert(0, COMFYUI)
    card = f"""---
library_name: diffusers
pipeline_tag: text-to-video
tags:
- text-to-video
- distillation
{base}---

# A student of {Path(args.pretrained_model_name_or_path).name if not args.tiny else "the tiny Wan teacher of tiedquiet"}

{of_blocks}, distilled with `tiedquiet.distill`.

```python
from diffusers import {imports}WanPipeline

{pipe}
frames = pipe({call}).frames
```

{"".join(f"{each}{chr(10)}{chr(10)}" for each in about)}Settings:

```
{settings}
```
"""
    write_text(out / "student" / "README.md", card)

"""What the experts learn from, made once: prompt embeddings and latents, in folders keyed by what they depend on."""

import hashlib
import json
import math
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from tiedquiet.distill.losses import segment_velocity
from tiedquiet.distill.options import beside, fail, needs_paths, write_text
from tiedquiet.distill.pipeline import Expert, Teacher, few_steps, guidance, nodes, padded
from tiedquiet.distill.sources import UselessClip, read_clip
from tiedquiet.distill.speed import speed_up

DECODED_AT_ONCE = 4  # more is slower on a CPU, and a long clip fills a GPU by itself


class Cache:
    """Tensors in a folder of their own for each set of circumstances, so that two sets are never mixed.

    Args:
        parent: where the folders lie.
        theme: what is kept, the first part of the folder's name.
        circumstances: whatever the tensors depend on, as JSON can hold it; `cache.json` in the folder repeats it.
    """

    def __init__(self, parent: Path, theme: str, circumstances: dict[str, Any]) -> None:
        text = json.dumps(circumstances, sort_keys=True, indent=1)
        self.folder = parent / f"{theme}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        self.text = text

    def path(self, name: str) -> Path:
        """The file of one tensor."""
        return self.folder / f"{name}.safetensors"

    def missing(self, names: Sequence[str]) -> list[int]:
        """The positions of those that are not there yet."""
        return [number for number, name in enumerate(names) if not self.path(name).exists()]

    def put(self, name: str, tensor: Tensor, of: object) -> None:
        """Keep a tensor of something; whoever is interrupted leaves no half of it.

        Raises:
            SystemExit: with status 2, after one line, if it is not finite: every later run would find it here.
        """
        if not tensor.isfinite().all():
            fail(f"what was made of {of} is not finite, so it is not kept; look at the teacher, and at its data type")
        if not (note := self.folder / "cache.json").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(note, self.text + "\n")
        with beside(self.path(name)) as part:
            save_file({"tensor": tensor.contiguous()}, part)

    def get(self, name: str) -> Tensor:
        """A tensor that was kept.

        Raises:
            SystemExit: with status 2, after one line that names the file, if it is torn.
        """
        try:
            return load_file(self.path(name))["tensor"]
        except (SafetensorError, KeyError) as error:
            fail(f"{self.path(name)}: is damaged ({error}); delete it, and the next run recreates it")


class Data:
    """Embeddings and latents of a run, and which of them each step sees.

    Args:
        args: the settings.
        prompts: one for each clip, or all different if there are no clips.
        clips: files; if there are none, the teacher samples `--samples_per_prompt` latents for each prompt.

    Attributes:
        prompts: all different; those of the samples, those for validation, and last the negative prompt.
        which: for each sample, the number of its prompt.
        texts: once prepared, the embedding of each prompt, (tokens, text_dim).
        seconds: that each batch of paths took, of those that were made.
    """

    def __init__(self, args: Namespace, prompts: Sequence[str], clips: Sequence[Path]) -> None:
        self.args = args
        self.clips = clips
        self.prompts = [*dict.fromkeys([*prompts, *args.validation_prompts]), args.negative_prompt]
        number = {prompt: n for n, prompt in enumerate(self.prompts[:-1])}
        each = 1 if clips else args.samples_per_prompt
        self.which = [number[prompt] for prompt in prompts for _ in range(each)]
        self.texts: list[Tensor] = []
        self.seconds: list[float] = []
        if clips:
            files = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in clips]
            self.names = [named(file) for file in files]
        else:
            # A sample's noise is its own, whatever other prompts there are and whichever --seed the run has. A prompt
            # that is there twice has twice as many.
            count: Counter[str] = Counter()
            samples = []
            for prompt in prompts:
                samples += [(prompt, n) for n in range(count[prompt], count[prompt] + each)]
                count[prompt] += each
            self.names = [named(f"{n} {prompt}") for prompt, n in samples]
            self.seeds = [int(name, 16) for name in self.names]

    def look(self, teacher: Teacher, dtype: torch.dtype) -> None:
        """Find the caches, whose names tell what made them; nothing is made yet."""
        args, key = self.args, teacher.key()
        made_by: dict[str, Any] = {"teacher": key, "dtype": str(dtype)}
        made_by |= {name: getattr(args, name) for name in ("max_sequence_length", "repair_ties")}
        self.embeddings = Cache(args.cache_dir, "prompts", made_by)
        shape = {"height": args.height, "width": args.width, "num_frames": args.num_frames}
        if self.clips:
            made_by = {"teacher": key, **shape}
        else:
            how = ("num_inference_steps", "negative_prompt", "student_steps", "teacher_attention")
            made_by |= {name: getattr(args, name) for name in how} | guidance(args) | shape
        self.latents = Cache(args.cache_dir, "paths" if args.student_steps else "latents", made_by)
        self.nodes, self.form = nodes(teacher.scheduler, args.student_steps or 1), teacher.latents(args)
        self.bytes_each = math.prod(self.form) * max(1, args.student_steps) * (4 if self.clips else dtype.itemsize)

    def lacking(self) -> list[int]:
        """The samples that are not in the cache yet."""
        return self.latents.missing(self.names) if needs_paths(self.args) else []

    def prepare(self, teacher: Teacher, accelerator: Accelerator, dtype: torch.dtype) -> None:
        """Make what is not in the caches yet, each process its share; encoder, VAE and experts are gone afterwards."""
        args, device, quiet = self.args, accelerator.device, not accelerator.is_local_main_process
        texts, names = self.embeddings, [named(prompt) for prompt in self.prompts]
        unread, unsampled = mine(texts.missing(names), accelerator), mine(self.lacking(), accelerator)
        accelerator.wait_for_everyone()  # all must have looked before anyone makes something
        if unread:
            embeddings = teacher.embed(
                [self.prompts[n] for n in unread], args.repair_ties, args.max_sequence_length, device, dtype
            )
            for n, embedding in zip(tqdm(unread, "prompt embeddings", disable=quiet), embeddings, strict=True):
                texts.put(names[n], embedding, repr(self.prompts[n]))
        accelerator.wait_for_everyone()
        self.texts = [texts.get(name) for name in names]

        if unsampled:
            (self.encode if self.clips else self.sample)(unsampled, teacher, device, dtype, quiet)
        accelerator.free_memory()
        accelerator.wait_for_everyone()
        if useless := set(self.lacking()):  # clips alone can be; all processes have looked at all of them
            kept = [n for n in range(len(self.names)) if n not in useless]
            if not kept:
                fail(f"--train_data_dir {args.train_data_dir}: none of its clips can be used, see above")
            self.names, self.which = [self.names[n] for n in kept], [self.which[n] for n in kept]
            self.clips = [self.clips[n] for n in kept]
            accelerator.print(f"{len(kept)} clips are used, {len(useless)} are left out", file=sys.stderr)

    @torch.no_grad()
    def encode(self, share: list[int], teacher: Teacher, device: torch.device, dtype: torch.dtype, quiet: bool) -> None:
        """Latents of the clips, normalised as the pipeline has them."""
        vae = teacher.load_vae(device)
        mean, deviation = (
            torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        for n in tqdm(share, "latents of the clips", disable=quiet):
            try:
                clip = read_clip(self.clips[n], self.args)
            except UselessClip as why:
                tqdm.write(f"left out: {why}", file=sys.stderr)
                continue
            latents = vae.encode(clip[None].to(device)).latent_dist.mode()
            self.latents.put(self.names[n], ((latents - mean) / deviation)[0].cpu(), self.clips[n])

    def sample(self, share: list[int], teacher: Teacher, device: torch.device, dtype: torch.dtype, quiet: bool) -> None:
        """Latents that the teacher samples for the prompts; the whole path at its nodes for a student of few steps."""
        args, pipe, size = self.args, teacher.pipeline(device, dtype), self.args.train_batch_size
        experts = (getattr(pipe, expert.name) for expert in teacher.experts)
        speed_up(list(experts), [], args)  # as in training: most of a run's hours may be spent here
        if args.student_steps:
            pipe.scheduler = few_steps(teacher.scheduler, args.student_steps, order=2)
        what = "paths of the teacher" if args.student_steps else "latents from the teacher"
        with tqdm(total=len(share), desc=what, disable=quiet) as bar:
            for start in range(0, len(share), size):
                batch, clock = share[start : start + size], time.perf_counter()
                prompts, seeds = [self.which[n] for n in batch], [self.seeds[n] for n in batch]
                steps = args.num_inference_steps
                path = sample(pipe, self, prompts, seeds, steps, guidance(args), args.student_steps)
                for n, made in zip(batch, path[:, 1:] if args.student_steps else path[:, -1], strict=True):
                    self.latents.put(self.names[n], made.to(dtype).cpu(), repr(self.prompts[self.which[n]]))
                self.seconds.append(time.perf_counter() - clock)
                bar.update(len(batch))
        if args.compile:
            torch.compiler.reset()  # what training compiles is counted against a limit

    def segments(self, paths: Tensor, expert: Expert, generator: torch.Generator) -> dict[str, Tensor]:
        """For each path a segment of it that starts on an expert's side: its start, and the velocity that crosses it.

        Args:
            paths: (batch, nodes, channels, frames, height, width).
            expert: whose timesteps are meant.
            generator: chooses the segments.
        """
        own = self.nodes.of(expert)
        chosen = torch.tensor(own)[torch.randint(len(own), (len(paths),), generator=generator)]
        row, sigmas = torch.arange(len(paths)), self.nodes.sigmas
        start, end = paths[row, chosen], paths[row, chosen + 1]
        target = segment_velocity(start, end, sigmas[chosen] - sigmas[chosen + 1])
        return {"x": start, "timesteps": self.nodes.timesteps[chosen], "target": target}

    def text(self, numbers: Sequence[int]) -> Tensor:
        """(batch, max_sequence_length, text_dim) embeddings of some prompts."""
        return padded([self.texts[n] for n in numbers], self.args.max_sequence_length)

    def batch(self, draw: int, process: int, processes: int) -> tuple[Tensor, list[int], torch.Generator]:
        """The samples of one draw, the same whether a run was interrupted before it or not.

        Args:
            draw: counts batches from the first step on.
            process: which of the processes asks.
            processes: how many there are.

        Returns:
            Latents (batch, channels, frames, height, width), or paths (batch, nodes, channels, ...) from the noise on,
            empty where none are kept; their prompts' numbers; and a generator for more noise.
        """
        size, chosen = self.args.train_batch_size, []
        for place in range((draw * processes + process) * size, (draw * processes + process + 1) * size):
            epoch, position = divmod(place, len(self.which))
            chosen.append(order(len(self.which), self.args.seed + epoch)[position])
        generator = torch.Generator().manual_seed(self.args.seed * 7_368_787 + draw * processes + process)
        return torch.stack([self.get(n) for n in chosen]), [self.which[n] for n in chosen], generator

    def get(self, sample: int) -> Tensor:
        """One sample, in float32. The noise that a path begins with is not kept: its seed gives it back."""
        if not needs_paths(self.args):
            return torch.empty(0)
        kept = self.latents.get(self.names[sample]).float()
        if not self.args.student_steps:
            return kept
        return torch.cat([noise_of(self.seeds[sample], self.form)[None], kept])


def named(what: str) -> str:
    """A file's name for something that is told by a text."""
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def noise_of(seed: int, form: Sequence[int]) -> Tensor:
    """What a clip begins as, (channels, frames, height, width)."""
    return torch.randn(*form, generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def order(count: int, seed: int) -> list[int]:
    """The samples of one epoch, shuffled."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def mine(numbers: list[int], accelerator: Accelerator) -> list[int]:
    """The share of one process."""
    return numbers[accelerator.process_index :: accelerator.num_processes]


def sample(
    pipe: Any,
    data: Data,
    prompts: Sequence[int],
    seeds: Sequence[int],
    steps: int,
    scales: dict[str, float],
    segments: int = 0,
) -> Tensor:
    """Latents of one clip for each prompt, each from a seed of its own, and how the pipeline came to them.

    Args:
        pipe: a `WanPipeline`.
        data: has the embeddings.
        prompts: numbers into `data.prompts`.
        seeds: one for each.
        steps: how many the scheduler takes.
        scales: of classifier-free guidance, as the pipeline calls them; 1 is none.
        segments: into how many the path is cut; 0 keeps its ends alone.

    Returns:
        (batch, segments + 1, channels, frames, height, width): the noise, then every node up to the clip.
    """
    args, device = data.args, pipe._execution_device
    noise = torch.stack([noise_of(seed, data.form) for seed in seeds]).to(device)
    path, empty = [noise], len(data.prompts) - 1

    def keep(pipe: Any, step: int, timestep: Tensor, states: dict[str, Tensor]) -> dict[str, Tensor]:
        if (step + 1) % (steps // (segments or 1)) == 0:
            path.append(states["latents"])
        return {}

    path[segments or 1 :] = pipe(  # not all schedulers take one step for each that is asked for
        prompt_embeds=data.text(prompts).to(device),
        negative_prompt_embeds=data.text([empty] * len(prompts)).to(device),
        height=args.height,
        width=args.width,
        num_frames=args.num_frames,
        num_inference_steps=steps,
        **scales,
        latents=noise,
        max_sequence_length=args.max_sequence_length,
        callback_on_step_end=keep,
        output_type="latent",
        return_dict=False,
    )
    return torch.stack(path, 1)


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """(batch, frames, 3, height, width), 0 to 1, of latents (batch, channels, frames, height, width)."""
    mean, deviation = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    parts = torch.split(latents.to(vae.dtype) * deviation + mean, DECODED_AT_ONCE)
    clips = [vae.decode(part).sample for part in parts]
    return (torch.cat(clips).transpose(1, 2).float() / 2 + 0.5).clamp(0, 1)

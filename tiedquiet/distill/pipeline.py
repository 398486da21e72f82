"""The teacher's pipeline folder in, with every tie of its text encoder proven; the student's pipeline folder out."""

import hashlib
import json
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import tiedquiet
from tiedquiet.distill.lora import FILE, with_lora
from tiedquiet.distill.options import fail, is_main_process, put

NO_GUIDANCE = {"guidance_scale": 1.0}
PIECES, PIECE, SMALL = 64, 2**16, 2**22  # of a file that tells whether a teacher is another; bytes


@contextmanager
def readable(place: Path) -> Iterator[None]:
    """Say in one line which part of a teacher, or which checkpoint, cannot be read, and why."""
    try:
        yield
    except (torch.OutOfMemoryError, tiedquiet.LoadError):  # which have a line of their own
        raise
    except (
        OSError,
        EOFError,
        LookupError,
        RuntimeError,
        SafetensorError,
        TypeError,
        UnpicklingError,
        ValueError,
    ) as error:
        fail(f"{place}: cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}")


@dataclass(frozen=True)
class Expert:
    """One transformer of the pipeline and the timesteps that are its own.

    Attributes:
        name: the subfolder, `transformer` or `transformer_2`.
        low: first timestep of its own, of `num_train_timesteps`.
        high: end of its timesteps; belongs to the next expert, except at the very end.
        steps: `num_train_timesteps`.
        shift: of the noise schedule.
    """

    name: str
    low: float
    high: float
    steps: int
    shift: float

    def sigmas(self, uniform: Tensor) -> Tensor:
        """Noise levels for training, drawn as the schedule has them but only from this expert's side.

        The shift is sigma = s u / (1 + (s - 1) u), arXiv:2403.03206, eq. 23; `uniform` is stretched over the u that
        lead to this side. The pipeline chooses by timestep, `t >= boundary_ratio * num_train_timesteps`, and so do we.

        Args:
            uniform: (batch,) float32, values from 0 to 1.

        Returns:
            (batch,) float32 from 0 to 1; times `steps` it is the timestep.
        """
        low, high = (
            sigma / (self.shift - (self.shift - 1) * sigma) for sigma in (self.low / self.steps, self.high / self.steps)
        )
        u = low + (high - low) * uniform.double()
        sigma = (self.shift * u / (1 + (self.shift - 1) * u)).float()
        # Rounding must not move one to the other side.
        end = torch.tensor(self.high / self.steps)
        last = end if self.high == self.steps else torch.nextafter(end, torch.tensor(0.0))
        return sigma.clamp(self.low / self.steps, last.item())


class Teacher:
    """A Wan text-to-video pipeline folder. Configurations are read at once, weights only where they are used.

    Args:
        name: a folder, or the name of a repository on the hub.
        revision: of that repository.
        shift: of the noise schedule, instead of the pipeline's own.

    Raises:
        SystemExit: with status 2, after one line, if there is none, or it is no Wan text-to-video pipeline.
    """

    def __init__(self, name: str, revision: str | None = None, shift: float | None = None) -> None:
        try:
            self.index = dict(WanPipeline.load_config(name, revision=revision))
        except (OSError, ValueError) as error:
            fail(f"{name}: no pipeline there: {' '.join(str(error).split())[:200]}")
        if self.index.get("_class_name") != "WanPipeline":
            fail(f"{name}: a {self.index.get('_class_name')}, not a Wan text-to-video pipeline (WanPipeline)")
        self.folder = Path(name if Path(name).is_dir() else WanPipeline.download(name, revision=revision))
        names = [n for n in ("transformer", "transformer_2") if (self.index.get(n) or [None])[0]]
        for part in (*names, "vae", "text_encoder", "tokenizer", "scheduler"):
            if not (self.folder / part).is_dir():
                fail(f"{name}: the pipeline has no {part}/")
        edge = self.index.get("boundary_ratio")
        between = isinstance(edge, int | float) and 0 < edge < 1
        if not between if len(names) == 2 else (names, edge) != (["transformer"], None):
            have = " and ".join(names) or "no transformer"
            fail(f"{name}: has {have}, and a boundary_ratio of {edge}: two need one between 0 and 1, and one has none")
        if not hasattr(transformers, encoder := str((self.index.get("text_encoder") or [None])[-1])):
            fail(f"{name}: its text_encoder is a {encoder}, which transformers does not have")
        self.parts = [part for part in self.index if (self.folder / part).is_dir()]
        self.transformer, *others = map(self.config, names)
        for key, value in self.transformer.items():
            if others and others[0].get(key) != value and not key.startswith("_"):
                fail(f"{name}: its two transformers differ in {key}, and the students are of one form")
        self.vae = self.config("vae")
        self.scheduler = self.config("scheduler", "scheduler_config.json")
        shifts = (shift, self.scheduler.get("flow_shift"), self.scheduler.get("shift"), 1.0)
        self.scheduler["flow_shift"] = shift = float(next(it for it in shifts if it is not None))
        steps = int(self.scheduler.get("num_train_timesteps", 1000))
        edge = float(edge or 0.0) * steps
        spans = [(edge, float(steps)), (0.0, edge)]
        self.experts = [Expert(n, low, high, steps, shift) for n, (low, high) in zip(names, spans, strict=False)]

    def config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        """The configuration of one part."""
        with readable(place := self.folder / part / file):
            return dict(json.loads(place.read_text(encoding="utf-8")))

    def key(self) -> str:
        """Changes with what the pipeline holds, not with where it lies, when it was copied, or what its README says.

        Of large files, sizes, beginnings and 64 pieces from all over are read: weights trained further differ there.
        """
        told = hashlib.sha256(f"{self.experts[0].shift}".encode())
        for part in sorted(self.parts):
            for path in sorted(path for path in (self.folder / part).rglob("*") if path.is_file()):
                size = path.stat().st_size
                told.update(f"{path.relative_to(self.folder)} {size}".encode())
                with path.open("rb") as file:
                    for place in sorted({size * n // PIECES for n in range(PIECES)}):
                        file.seek(place)
                        told.update(file.read(max(PIECE, size // PIECES if size < SMALL else 0)))
        return told.hexdigest()[:16]

    def latents(self, args: Namespace) -> tuple[int, int, int, int]:
        """The form of a clip's latents: channels, frames, height, width."""
        time, space = self.vae.get("scale_factor_temporal", 4), self.vae.get("scale_factor_spatial", 8)
        return self.vae["z_dim"], (args.num_frames - 1) // time + 1, args.height // space, args.width // space

    def expert(self, expert: Expert, dtype: torch.dtype) -> WanTransformer3DModel:
        """One expert with its weights."""
        return self.loaded(WanTransformer3DModel, expert.name, dtype)

    def load_vae(self, device: torch.device) -> AutoencoderKLWan:
        """The VAE, in float32 as Wan runs it."""
        return self.loaded(AutoencoderKLWan, "vae", torch.float32).to(device)

    def loaded(self, cls: Any, part: str, dtype: torch.dtype) -> Any:
        """A model of diffusers, all of whose weights are in its files; diffusers itself would only warn."""
        with readable(place := self.folder / part):
            model, info = cls.from_pretrained(place, dtype=dtype, output_loading_info=True)
        if lost := sorted(info["missing_keys"]):
            fail(f"{place}: its files lack {len(lost)} of its weights: {', '.join(lost[:3])}")
        return model

    def text_encoder(self, repair: bool, dtype: torch.dtype, broken: bool = False) -> Any:
        """The text encoder with every tie proven: a student that learns from a broken one's embeddings is lost.

        Args:
            repair: tie what was left untied, instead of stopping.
            dtype: of its weights.
            broken: load it as transformers 5.0 to 5.2 did, which took the config's `tie_word_embeddings: false` at its
                word; nothing is proven then, unless `repair` is asked for.

        Raises:
            SystemExit: with status 2, after one line, if a tie is not proven or a weight is missing.
        """
        cls = getattr(transformers, self.index["text_encoder"][1])
        place = self.folder / "text_encoder"
        config = cls.config_class.from_pretrained(place)
        if broken:
            config.tie_word_embeddings = False  # past its constructor, which forces true since 5.3
        try:
            mode = "repair" if repair else "on" if broken else "strict"
            with readable(place), tiedquiet.enable(mode):
                encoder, info = cls.from_pretrained(place, config=config, dtype=dtype, output_loading_info=True)
        except tiedquiet.LoadError as error:
            fail(f"{error}; --repair_ties ties it and goes on")
        findings = tiedquiet.check(encoder).findings
        proven = {finding.key for finding in findings if finding.verdict is tiedquiet.Verdict.TIED}
        lost = sorted({*info["missing_keys"], *(finding.key for finding in findings)} - proven)
        if lost and not broken:
            fail(f"{place}: not proven to come from the checkpoint: {', '.join(lost[:3])}")
        for finding in findings if is_main_process() else ():
            # Above whatever bar is shown.
            tqdm.write(f"text encoder: {finding.key} is {finding.source}: {finding.verdict.value}")
        return encoder.eval()

    @torch.no_grad()
    def embed(
        self,
        prompts: Sequence[str],
        repair: bool,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
        broken: bool = False,
    ) -> Iterator[Tensor]:
        """Prompt embeddings, each (tokens, text_dim), without the zeros that the pipeline pads them with.

        Args:
            prompts: to encode, one after the other.
            repair: see `text_encoder`, as for `dtype` and `broken`.
            length: tokens after which a prompt is cut.
            device: where the encoder runs.
            dtype: of its weights.
            broken: see `text_encoder`.
        """
        encoder = self.text_encoder(repair, dtype, broken).to(device)
        with readable(place := self.folder / "tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        pipe = WanPipeline(tokenizer, encoder, None, UniPCMultistepScheduler())
        for prompt in prompts:
            embedding = pipe.encode_prompt(
                prompt, do_classifier_free_guidance=False, max_sequence_length=length, device=device
            )[0][0]
            used = embedding.abs().amax(-1).nonzero()
            yield embedding[: int(used.max()) + 1].cpu()

    def pipeline(
        self, device: torch.device, dtype: torch.dtype, aside: bool = True, **students: WanTransformer3DModel
    ) -> WanPipeline:
        """The pipeline without its text encoder.

        Args:
            device: where it runs.
            dtype: of the experts that are loaded.
            aside: on a GPU, of two experts the one that is not asked waits in main memory. Not while one of them is in
                training: it would be left there, where neither DDP nor its optimizer looks for it.
            students: take the place of the experts that they are named after.
        """
        models = {e.name: students.get(e.name) or self.expert(e, dtype) for e in self.experts}
        vae = self.load_vae(torch.device("cpu"))
        pipe = WanPipeline.from_pretrained(self.folder, text_encoder=None, tokenizer=None, vae=vae, **models)
        pipe.set_progress_bar_config(disable=True)
        config = pipe.scheduler.config
        shift = "flow_shift" if "flow_shift" in config else "shift"
        pipe.scheduler = type(pipe.scheduler).from_config({**config, shift: self.experts[0].shift})
        if device.type == "cuda" and len(self.experts) > 1 and aside:  # pragma: no cover - needs a GPU
            pipe.enable_model_cpu_offload(device=device)
            return pipe
        return pipe.to(device)


@dataclass(frozen=True)
class Nodes:
    """Between which points of the teacher's path a student of few steps goes.

    Attributes:
        timesteps: (steps,), of `num_train_timesteps`.
        sigmas: (steps + 1,), the last is 0.
    """

    timesteps: Tensor
    sigmas: Tensor

    def of(self, expert: Expert) -> list[int]:
        """The nodes that are an expert's own."""
        return [k for k, t in enumerate(self.timesteps.tolist()) if expert.low <= t < expert.high]


def nodes(config: Mapping[str, Any], steps: int) -> Nodes:
    """Those of the student's scheduler, see `few_steps`."""
    scheduler = few_steps(config, steps)
    scheduler.set_timesteps(steps)
    return Nodes(scheduler.timesteps.float(), scheduler.sigmas.float())


def check_nodes(teacher: Teacher, trained: Sequence[Expert], args: Namespace) -> None:
    """Stop where a student of few steps would leave an expert without a step: it would have nothing to learn.

    Raises:
        SystemExit: with status 2, after one line that has the numbers of steps that work.
    """

    def idle(steps: int) -> list[Expert]:
        return [expert for expert in trained if not nodes(teacher.scheduler, steps).of(expert)]

    if not args.student_steps or not (empty := idle(args.student_steps)):
        return
    many = args.num_inference_steps
    work = [str(n) for n in range(2, many + 1) if many % n == 0 and not idle(n)]
    side = ("high", "low")
    others = [n for n, expert in enumerate(teacher.experts) if expert in trained and expert not in empty]
    fail(
        f"--student_steps {args.student_steps}: at shift {empty[0].shift:g} none of them is a step of {empty[0].name}, "
        f"whose timesteps are {empty[0].low:g} to {empty[0].high:g}; {', '.join(work) or 'no number'} would do"
        + "".join(f", or --expert {side[n]} to train {teacher.experts[n].name} alone" for n in others)
    )


def guidance(args: Namespace) -> dict[str, float]:
    """How the teacher is guided when it samples, as `WanPipeline` takes it; Wan2.2's experts have a scale each."""
    scales = {"guidance_scale": args.sample_guidance_scale, "guidance_scale_2": args.sample_guidance_scale_2}
    return {name: scale for name, scale in scales.items() if scale is not None}


def compute_dtype(args: Namespace) -> torch.dtype:
    """What the teacher is stored in and everything but the VAE is computed in."""
    return torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32


def padded(embeddings: Sequence[Tensor], length: int) -> Tensor:
    """(batch, length, text_dim) of embeddings of different lengths, zeros behind, as the pipeline pads them."""
    out = embeddings[0].new_zeros(len(embeddings), length, embeddings[0].shape[-1])
    for row, embedding in zip(out, embeddings, strict=True):
        row[: len(embedding)] = embedding[:length]
    return out


def groups(teacher_blocks: int, student_blocks: int) -> list[range]:
    """The consecutive teacher blocks that each student block stands for, and begins as the first of."""
    edges = [teacher_blocks * n // student_blocks for n in range(student_blocks + 1)]
    return [range(start, end) for start, end in pairwise(edges)]


def new_student(teacher: WanTransformer3DModel, blocks: int, dtype: torch.dtype) -> WanTransformer3DModel:
    """A transformer of `blocks` blocks with the teacher's weights, where they are; float32 where those are float32."""
    first = [group[0] for group in groups(len(teacher.blocks), blocks)]
    begun = {}
    for source, theirs in teacher.state_dict().items():
        name = source
        if source.startswith("blocks."):
            number, rest = source.removeprefix("blocks.").split(".", 1)
            if int(number) not in first:
                continue
            name = f"blocks.{first.index(int(number))}.{rest}"
        begun[name] = theirs.detach().to(dtype if theirs.dtype != torch.float32 else torch.float32, copy=True)
    return assembled({**teacher.config, "num_layers": blocks}, begun).to(teacher.device)


def assembled(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> WanTransformer3DModel:
    """A transformer of exactly these weights; none are drawn only to be thrown away."""
    with init_empty_weights():
        model = WanTransformer3DModel.from_config(dict(config))
    model.load_state_dict(state, assign=True)
    return model


def load_student(teacher: Teacher, expert: Expert, folder: Path, dtype: torch.dtype) -> WanTransformer3DModel:
    """The student that a stage left in a folder, whole or as an adapter of the teacher."""
    if (adapter := folder / "student" / FILE).exists():
        return with_lora(teacher.expert(expert, dtype), load_file(adapter))
    return WanTransformer3DModel.from_pretrained(folder / "student", dtype=dtype)


def save_weights(config: Mapping[str, Any], state: Mapping[str, Tensor], place: Path) -> None:
    """Write an expert's folder beside its place and move it there. FSDP's models have parts: `state` is the whole."""
    with tempfile.TemporaryDirectory(prefix=".part-", dir=place.parent) as beside:
        assembled(config, state).save_pretrained(Path(beside) / place.name)
        put(Path(beside) / place.name, place)


def few_steps(config: Mapping[str, Any], steps: int, order: int = 1) -> UniPCMultistepScheduler:
    """The scheduler with which plain `WanPipeline` takes exactly the steps that a student was trained for.

    UniPC of order 1 without its corrector is Euler's method, and its sigmas, s u / (1 + (s - 1) u) for u = 1, 1 - 1/n,
    ..., 1/n, are every k-th of those that a teacher with k n steps takes. `FlowMatchEulerDiscreteScheduler` would space
    them differently, and waste its last step (https://github.com/huggingface/diffusers/issues/13243).

    Args:
        config: of the teacher's scheduler; its `flow_shift`, or `shift`, is s.
        steps: n.
        order: of the solver; 2, with its corrector, is how a teacher is sampled at its own many steps.
    """
    return UniPCMultistepScheduler(
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=config.get("flow_shift", config.get("shift", 1.0)),
        solver_order=order,
        disable_corrector=list(range(steps)) if order == 1 else [],
    )


def size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

"""A clip of the teacher beside one of its four-step student, and a step of training the student: seconds of each.

    python benchmarks/distill_clip.py                     # one GPU: Wan2.1-T2V-1.3B shape, 480x832x81 frames
    python benchmarks/distill_clip.py --shape tiny --device cpu --timed_steps 2

Random weights, bf16, batch 1, plain diffusers with torch's attention. Teacher: 30 blocks, 50 steps, guided, so 100
forward passes; student: half the blocks, 4 steps, no guidance. They take turns. Of the teacher's 50 equal steps
`--timed_steps` are timed and scaled; the student's 4 are timed whole. Decoding, the same for both, is timed apart. A
step of training is the forward and backward pass of a student kept in float32 under bf16 autocast, blocks
checkpointed, and AdamW; velocity distillation adds the teacher's forward pass, or two where guidance is distilled.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.distill_step import CHANNELS, SHAPES, models
from benchmarks.record import arguments, show, spread, stop, write

STEPS, STUDENT_STEPS = 50, 4


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", default="wan2.1-1.3b", help=f"one of {', '.join(SHAPES)} (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="clips of each (default: %(default)s)")
    parser.add_argument("--timed_steps", type=int, default=10, help="of the teacher's 50 (default: %(default)s)")
    options = parser.parse_args()
    if options.shape not in SHAPES:
        stop(f"no shape {options.shape!r}; there are {', '.join(SHAPES)}")
    if options.rounds < 1 or not 1 <= options.timed_steps <= STEPS:
        stop(f"at least one round, and 1 to {STEPS} timed steps")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        stop("no CUDA device; --device cpu --shape tiny tries it out")
    shape, device = SHAPES[options.shape], torch.device(options.device)
    teacher, student = models(shape, device, "bfloat16")
    results = clips(options, shape, device, teacher, student.eval())
    results |= training(options, shape, device, teacher)
    if device.type == "cuda":
        results["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    path = write(f"distill-clip-{options.shape}", {**vars(options), "out": None, "model": shape}, results, options.out)
    print("| | seconds |\n| --- | --- |")
    for name, value in results.items():
        print(f"| {name.replace('_', ' ')} | {show(value) if isinstance(value, dict) else f'{value:.3g}'} |")
    plot(path, results, options.shape)
    print(path)


def plot(path: Path, results: dict[str, Any], shape: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
    for name, colour in ("teacher", "tab:blue"), ("student", "tab:orange"):
        left.barh(name, results[f"{name}_denoising"]["median"], color=colour)
        left.barh(name, results["decoding"], left=results[f"{name}_denoising"]["median"], color="tab:grey")
    left.set(
        xlabel="seconds per clip (grey: decoding)", title=f"{shape}: {results['times_as_fast']['median']:.0f} times"
    )
    left.invert_yaxis()
    steps = {name.removeprefix("training step, "): v["median"] for name, v in results.items() if "training" in name}
    right.barh(list(steps), list(steps.values()), color="tab:green")
    right.set(xlabel="seconds per training step")
    right.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


def timed(work: Callable[[], Any], device: Any) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def clips(options: Any, shape: dict[str, int], device: Any, teacher: Any, student: Any) -> dict[str, Any]:
    """Denoising by WanPipeline itself, and decoding, which is the same for both."""
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    text = {
        name: torch.randn(1, shape["tokens"], shape["text"], device=device, dtype=torch.bfloat16)
        for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    size = {"height": 8 * shape["h"], "width": 8 * shape["w"], "num_frames": 4 * shape["f"] - 3}
    with torch.device(device):
        vae = AutoencoderKLWan() if options.shape != "tiny" else AutoencoderKLWan(base_dim=8, z_dim=CHANNELS)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, num_train_timesteps=1000
    )

    def denoise(transformer: Any, steps: int, guidance: float) -> Callable[[], Any]:
        pipe = WanPipeline(None, None, vae, scheduler, transformer)
        pipe.set_progress_bar_config(disable=True)
        return lambda: (
            pipe(**text, **size, num_inference_steps=steps, guidance_scale=guidance, output_type="latent").frames
        )

    arms = {"teacher": denoise(teacher, options.timed_steps, 5.0), "student": denoise(student, STUDENT_STEPS, 1.0)}
    denoise(teacher, 1, 1.0)()  # kernels are loaded
    denoise(student, 1, 1.0)()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(options.rounds):
        for name, arm in arms.items():
            seconds[name].append(timed(arm, device) * (STEPS / options.timed_steps if name == "teacher" else 1))
    latents = torch.randn(1, CHANNELS, shape["f"], shape["h"], shape["w"], device=device)
    with torch.no_grad():
        decode = [timed(lambda: vae.decode(latents), device) for _ in range(2)][1]
    ratios = [one / other for one, other in zip(seconds["teacher"], seconds["student"], strict=True)]
    return {
        "teacher_denoising": spread(seconds["teacher"]),
        "student_denoising": spread(seconds["student"]),
        "times_as_fast": spread(ratios),
        "decoding": decode,
        "times_as_fast_with_decoding": (statistics.median(seconds["teacher"]) + decode)
        / (statistics.median(seconds["student"]) + decode),
    }


def training(options: Any, shape: dict[str, int], device: Any, teacher: Any) -> dict[str, Any]:
    """Seconds of a training step on cached paths, and of velocity distillation without and with guidance."""
    import torch
    from torch.nn.functional import mse_loss

    from tiedquiet.distill.pipeline import new_student

    student = new_student(teacher, shape["blocks"] // 2, torch.float32).float().train().requires_grad_(True)
    student.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=device.type == "cuda" or None)
    x, target = (torch.randn(1, CHANNELS, shape["f"], shape["h"], shape["w"], device=device) for _ in range(2))
    text, t = torch.randn(1, shape["tokens"], shape["text"], device=device), torch.tensor([900.0], device=device)

    def step(passes: int) -> None:
        wanted = target
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                for _ in range(passes):
                    wanted = teacher(x.bfloat16(), t, text.bfloat16(), return_dict=False)[0].float()
            loss = mse_loss(student(x, t, text, return_dict=False)[0].float(), wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step(1)
    seconds: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name, passes in ("segments", 0), ("velocity", 1), ("guided velocity", 2):
            seconds.setdefault(f"training step, {name}", []).append(timed(lambda n=passes: step(n), device))
    return {name: spread(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()

"""A clip of the teacher beside one of its two-step student, with all blocks and with half: seconds of each.

    python -m benchmarks.distill.clip                     # one GPU: Wan2.1-T2V-1.3B shape, 480x832x81 frames
    python -m benchmarks.distill.clip --shape tiny --device cpu --timed_steps 2
    python -m benchmarks.distill.clip --paths             # a path of the teacher as training has its blocks

Random weights, bf16, batch 1, plain diffusers with torch's attention. Teacher: 30 blocks, 50 steps, guided, so 100
forward passes; students: all blocks or half of them, 2 steps, no guidance. They take turns. Of the teacher's 50 equal
steps `--timed_steps` are timed and scaled; the student's 2 are timed whole. Decoding, the same for all, is timed apart.
"""

import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.distill.shapes import CHANNELS, SHAPES, models
from benchmarks.record import arguments, show, spread, stop, write

STEPS, STUDENT_STEPS = 50, 2
PATH_STEPS = 48
PATHS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": {"compile": True},
    "compiled, float8": {"compile": True, "teacher_attention": "float8"},
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", default="wan2.1-1.3b", help=f"one of {', '.join(SHAPES)} (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="clips of each (default: %(default)s)")
    parser.add_argument("--timed_steps", type=int, default=10, help="of the teacher's 50 (default: %(default)s)")
    parser.add_argument(
        "--paths", action="store_true", help="instead: a cached path of 48 guided steps, plain, compiled and in float8"
    )
    options = parser.parse_args()
    if options.shape not in SHAPES:
        stop(f"no shape {options.shape!r}; there are {', '.join(SHAPES)}")
    if options.rounds < 1 or not 1 <= options.timed_steps <= STEPS:
        stop(f"at least one round, and 1 to {STEPS} timed steps")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        stop("no CUDA device; --device cpu --shape tiny tries it out")
    shape, device = SHAPES[options.shape], torch.device(options.device)
    teacher, half = models(shape, device, "bfloat16")
    if options.paths:
        del half
        results = paths(options, shape, device, teacher)
        path = write(
            f"distill-paths-{options.shape}", {**vars(options), "out": None, "model": shape}, results, options.out
        )
        print("| a path | seconds | times as fast |\n| --- | ---: | ---: |")
        for name, value in results.items():
            print(f"| {name} | {show(value['seconds'], digits=1)} | {value['times_as_fast']:.2f} |")
        print(path)
        return
    # A student of all blocks is as large as its teacher, and as fast a step.
    results = clips(options, shape, device, teacher, {"all_blocks": teacher, "half_the_blocks": half.eval()})
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

    figure, axis = plt.subplots(figsize=(7, 2.6))
    for name, colour in ("teacher", "tab:blue"), ("all_blocks", "tab:orange"), ("half_the_blocks", "tab:red"):
        label = name.replace("_", " ")
        axis.barh(label, results[f"{name}_denoising"]["median"], color=colour)
        axis.barh(label, results["decoding"], left=results[f"{name}_denoising"]["median"], color="tab:grey")
    axis.set(xlabel="seconds per clip (grey: decoding)", title=f"{shape}: teacher and students of two steps")
    axis.invert_yaxis()
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


def paths(options: Any, shape: dict[str, int], device: Any, teacher: Any) -> dict[str, Any]:
    """Denoising of `PATH_STEPS` guided steps, by blocks as `--compile` and `--teacher_attention` have them."""
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    from tiedquiet.distill.options import parse
    from tiedquiet.distill.speed import speed_up

    flash3 = device.type == "cuda" and find_spec("fa3_fwd_interface")
    if not flash3:
        print("without FlashAttention-3 (a Hopper GPU, pip install fa3-fwd) nothing is in float8", file=sys.stderr)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, num_train_timesteps=1000
    )
    pipe = WanPipeline(None, None, AutoencoderKLWan(base_dim=8, z_dim=CHANNELS), scheduler, teacher)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {
        name: torch.randn(1, shape["tokens"], shape["text"], device=device, dtype=torch.bfloat16)
        for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    call |= {"height": 8 * shape["h"], "width": 8 * shape["w"], "num_frames": 4 * shape["f"] - 3}
    call |= {"latents": torch.randn(1, CHANNELS, shape["f"], shape["h"], shape["w"], device=device)}
    call |= {"guidance_scale": 5.0, "output_type": "latent"}
    torch._dynamo.config.recompile_limit = 100
    told: dict[str, Any] = {}
    plain: Any = None
    for name in list(PATHS) if flash3 else list(PATHS)[:2]:
        args = parse("", ["--pretrained_model_name_or_path", "none"])
        vars(args).update(PATHS[name])
        speed_up([teacher], [], args)
        pipe(**call, num_inference_steps=2)  # compiles, loads kernels
        clip: Any = None
        seconds = []
        for _ in range(options.rounds):
            start = time.perf_counter()
            clip = pipe(**call, num_inference_steps=options.timed_steps).frames
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() - start) * PATH_STEPS / options.timed_steps)
        plain = clip if plain is None else plain
        told[name] = {
            "seconds": spread(seconds),
            "difference_to_plain": float((clip - plain).float().norm() / plain.float().norm()),
        }
        told[name]["times_as_fast"] = told["plain"]["seconds"]["median"] / told[name]["seconds"]["median"]
    return told


def clips(options: Any, shape: dict[str, int], device: Any, teacher: Any, students: dict[str, Any]) -> dict[str, Any]:
    """Denoising by WanPipeline itself, and decoding, which is the same for all."""
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

    arms = {"teacher": denoise(teacher, options.timed_steps, 5.0)}
    for name, student in students.items():
        denoise(student, 1, 1.0)()  # kernels are loaded
        arms[name] = denoise(student, STUDENT_STEPS, 1.0)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(options.rounds):
        for name, arm in arms.items():
            seconds[name].append(timed(arm, device) * (STEPS / options.timed_steps if name == "teacher" else 1))
    latents = torch.randn(1, CHANNELS, shape["f"], shape["h"], shape["w"], device=device)
    with torch.no_grad():
        decode = [timed(lambda: vae.decode(latents), device) for _ in range(2)][1]
    results: dict[str, Any] = {f"{name}_denoising": spread(of) for name, of in seconds.items()}
    results["decoding"] = decode
    whole = statistics.median(seconds["teacher"]) + decode
    for name in students:
        ratios = [one / other for one, other in zip(seconds["teacher"], seconds[name], strict=True)]
        results[f"times_as_fast_{name}"] = spread(ratios)
        results[f"times_as_fast_with_decoding_{name}"] = whole / (statistics.median(seconds[name]) + decode)
    return results


if __name__ == "__main__":
    main()

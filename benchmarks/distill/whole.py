"""The whole example on a pipeline of a real Wan's size, with random weights: what its plan said, what it took.

    python -m benchmarks.distill.whole                    # one GPU: Wan2.1-T2V-1.3B, its UMT5-XXL, its VAE; LoRA
    python -m benchmarks.distill.whole --lora_rank 0      # whole weights
    python -m benchmarks.distill.whole --shape tiny --device cpu

A pipeline folder of that form is made, of the text encoder only `shared.weight` stored and its tie denied, as the
published one is; then `python -m tiedquiet.distill` runs on it with the options that docs/example.md recommends, from
two prompts, for a few steps of both stages, to the finished student and its pictures. What random weights draw is
noise; what it costs is what it would cost. Two things tell a short run from a long one. The first path and the first
step of each stage compile: beside the sums stands what all would have taken at the median of the later ones. And the
plan's disk is the most that a run may need: so short a run writes no checkpoint.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.distill.shapes import CHANNELS, SHAPES, wan_transformer
from benchmarks.load.gpu import SIZES as ENCODERS
from benchmarks.record import arguments, stop, write

ROOT = Path(__file__).parents[2]
FLAGS = ["--gradient_checkpointing", "attention", "--compile"]
PROMPTS = "a cat on a surfboard\na red boat in the rain\n"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=["wan2.1-1.3b", "tiny"], default="wan2.1-1.3b")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu (default: %(default)s)")
    parser.add_argument("--lora_rank", type=int, default=64, help="0: whole weights (default: %(default)s)")
    parser.add_argument("--student_steps", type=int, default=2)
    parser.add_argument("--max_train_steps", type=int, default=6)
    parser.add_argument("--distribution_matching_steps", type=int, default=6)
    parser.add_argument("--num_inference_steps", type=int, default=12, help="of the teacher (default: %(default)s)")
    options = parser.parse_args()
    steps = options.student_steps
    if options.max_train_steps < 1 or steps < 1 or options.num_inference_steps % steps:
        stop("at least one training step, and teacher steps that are a multiple of the student's")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        stop("no CUDA device; --device cpu --shape tiny tries it out")
    shape = SHAPES[options.shape]
    flags = [*FLAGS, "--lr_warmup_steps", "2"]
    for name in ("lora_rank", "student_steps", "max_train_steps", "distribution_matching_steps", "num_inference_steps"):
        flags += [f"--{name}", str(getattr(options, name))]
    size = {"height": 8 * shape["h"], "width": 8 * shape["w"], "num_frames": 4 * shape["f"] - 3}
    for name, value in (*size.items(), ("max_sequence_length", shape["tokens"])):
        flags += [f"--{name}", str(value)]
    with tempfile.TemporaryDirectory() as folder:
        teacher, out = Path(folder) / "teacher", Path(folder) / "out"
        start = time.perf_counter()
        make(teacher, options.shape, shape, options.device)
        made = time.perf_counter() - start
        gigabytes = sum(file.stat().st_size for file in teacher.rglob("*.safetensors")) / 1e9
        (Path(folder) / "prompts.txt").write_text(PROMPTS)
        command = [sys.executable, "-m", "tiedquiet.distill", "--pretrained_model_name_or_path", str(teacher)]
        command += ["--prompts_file", str(Path(folder) / "prompts.txt"), "--output_dir", str(out), *flags]
        with Watched(out) as disk:
            done = subprocess.run(command, stdout=sys.stderr, cwd=ROOT)
        if done.returncode:
            stop("the example failed, as told above")
        metrics = json.loads((out / "metrics.json").read_text())
        files = {
            str(file.relative_to(out)): file.stat().st_size
            for file in sorted(out.rglob("*"))
            if file.is_file() and "cache" not in file.parts
        }
    results = {
        "teacher_gigabytes": gigabytes,
        "making_the_teacher": made,
        **metrics,
        "disk_gb": disk.most / 1e9,
        "files": files,
    }
    configuration = {**vars(options), "out": None, "model": shape, "flags": flags}
    kind = f"lora-{options.lora_rank}" if options.lora_rank else "all-weights"
    path = write(f"distill-whole-{options.shape}-{kind}", configuration, results, options.out)
    print("| | seconds | peak GiB |\n| --- | ---: | ---: |")
    for name, phase in metrics["phases"].items():
        print(f"| {name} | {phase['seconds']:.1f} | {phase.get('peak_gib', 0):.1f} |")
    print(f"| all of it | {metrics['seconds']:.1f} | |")
    print("\n| | planned | taken | warmed up |\n| --- | ---: | ---: | ---: |")
    for name, spent in metrics["took"].items():
        planned = metrics["planned"]["seconds"][name]
        print(f"| {name}, s | {planned:.1f} | {spent['seconds']:.1f} | {spent['warm']:.1f} |")
    learning = [phase.get("peak_gib", 0) for name, phase in metrics["phases"].items() if name.startswith("training")]
    print(f"| memory while it learns, GiB | {metrics['planned']['gib']:.1f} | {max(learning):.1f} | |")
    print(f"| disk, GB | {metrics['planned']['gb']:.1f} | {disk.most / 1e9:.1f} | |")
    plot(path, metrics["phases"], options.shape)
    print(path)


class Watched:
    """The bytes that a folder holds at the most while something runs, without what is linked to elsewhere.

    Args:
        folder: it need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self.over = folder, 0, threading.Event()

    def __enter__(self) -> "Watched":
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    def watch(self) -> None:
        while True:
            last = self.over.wait(0.5)
            self.most = max(self.most, self.held())
            if last:
                return

    def held(self) -> int:
        total = 0
        for parent, _, names in os.walk(self.folder):
            for name in names:
                try:
                    told = os.lstat(Path(parent) / name)
                except FileNotFoundError:  # it has just gone
                    continue
                total += told.st_size if told.st_nlink == 1 else 0
        return total


def make(folder: Path, name: str, shape: dict[str, int], device: str) -> None:
    """Write a Wan2.1 pipeline folder of random weights."""
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
    from safetensors.torch import load_file, save_file
    from transformers import UMT5Config, UMT5EncoderModel

    from tiedquiet.distill.options import TINY_WAN

    tiny = name == "tiny"
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        encoder = UMT5EncoderModel(UMT5Config(**(sizes if tiny else ENCODERS["xxl"])))
        transformer = wan_transformer(shape)
    torch.set_default_dtype(torch.float32)
    vae = AutoencoderKLWan(base_dim=8, z_dim=CHANNELS) if tiny else AutoencoderKLWan()
    encoder.save_pretrained(folder / "text_encoder")
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, num_train_timesteps=1000
    ).save_pretrained(folder / "scheduler")
    shutil.copytree(TINY_WAN / "tokenizer", folder / "tokenizer")
    index: dict[str, Any] = json.loads((TINY_WAN / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "transformer_2": [None, None], "boundary_ratio": None}, indent=2) + "\n"
    )
    for file in (folder / "text_encoder").glob("*.safetensors"):
        tensors = load_file(file)
        if tensors.pop("encoder.embed_tokens.weight", None) is not None:
            save_file(tensors, file, metadata={"format": "pt"})
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}, indent=2) + "\n")


def plot(path: Path, phases: dict[str, dict[str, float]], shape: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.6), sharey=True)
    left.barh(list(phases), [phase["seconds"] for phase in phases.values()])
    left.set(xlabel="seconds", title=f"{shape}, two prompts")
    right.barh(list(phases), [phase.get("peak_gib", 0) for phase in phases.values()], color="tab:orange")
    right.set(xlabel="peak GPU memory, GiB")
    left.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()

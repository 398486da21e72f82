"""Running the example as its users do, in processes of their own, and reading what it left."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tiedquiet.distill.options import TINY_WAN
from tiedquiet.distill.pipeline import Expert, Teacher

ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
}
TWO = "a red circle moving left\na blue square moving up\n"
# Small enough to take seconds; few prompts, because every clip that is judged has to be decoded.
SHORT = ["--samples_per_prompt", "2", "--train_batch_size", "2", "--num_inference_steps", "4", "--max_train_steps", "3"]
SHORT += ["--distribution_matching_steps", "2"]
VELOCITY = ["--student_steps", "0", "--distribution_matching_steps", "0"]
# `accelerate launch --cpu` would want MPI for this; --multi_gpu is torchrun, and ACCELERATE_USE_CPU keeps it to CPUs.
IN_TWO_PROCESSES = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
IN_TWO_PROCESSES += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def run(
    *args: str | Path, launch: Sequence[str] = (), module: str = "tiedquiet.distill"
) -> subprocess.CompletedProcess[str]:
    """`python -m tiedquiet.distill`, maybe under another launcher."""
    command = [sys.executable, *launch, "-m", module, *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, cwd=Path(__file__).parents[2]
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


def copied(folder: Path, **index: Any) -> Path:
    """A copy of the tiny teacher with another `model_index.json`."""
    shutil.copytree(TINY_WAN, folder)
    told = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**told, **index}))
    return folder


CHECKPOINT = "checkpoints/transformer/segments/checkpoint-1"

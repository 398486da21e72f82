"""GPU load with and without tiedquiet, interleaved in one process.

    python -m benchmarks.load.gpu                      # UMT5-XXL shape, 11.36 GB, on the GPU
    python -m benchmarks.load.gpu --size tiny --device cpu --rounds 3 --cold-rounds 1

Writes (once, cached) the text encoder folder of a Wan pipeline with random weights: only `shared.weight` is stored and
`tie_word_embeddings` is false, as the published ones are. Each round loads it once per arm, in rotating order:
`nothing` twice (the second is the noise of the baseline against itself), tiedquiet, a `logging.Filter` that drops LOAD
REPORT records, and `set_verbosity_error()`. Ratios are taken within a round. Every load is checked: tied, and equal to
what was stored.
"""

import argparse
import ctypes
import gc
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.clocks import Clocks
from benchmarks.record import PAGE_INCHES, arguments, show, spread, stop, turned, write
from benchmarks.silencers.ways import nothing, record_filter, verbosity_error

SIZES = {
    "tiny": {"vocab_size": 1024, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    "small": {"vocab_size": 256384, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "xxl": {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
}
KEY, SOURCE = "encoder.embed_tokens.weight", "shared.weight"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--size", default="xxl", help=f"one of {', '.join(SIZES)} (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="warm rounds (default: %(default)s)")
    parser.add_argument("--cold-rounds", type=int, default=2, help="rounds with the page cache dropped (default: 2)")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/tiedquiet-benchmarks").expanduser())
    parser.add_argument("--hooks", type=Path, help=argparse.SUPPRESS)  # how it calls itself
    options = parser.parse_args()
    if options.hooks:
        time_hooks(options.hooks, options.device, options.rounds)
        return
    if options.size not in SIZES:
        stop(f"no size {options.size!r}; there are {', '.join(SIZES)}")
    if options.rounds < 1 or options.cold_rounds < 0:
        stop("at least one warm round, and no negative number of cold ones")
    import torch
    import transformers

    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: falling back to the CPU, whose figures say nothing about a GPU", file=sys.stderr)
        options.device = "cpu"
    transformers.logging.disable_progress_bar()
    folder = checkpoint(options.size, options.cache, options.device)
    size = (folder / "model.safetensors").stat().st_size

    rounds = []
    total = options.rounds + options.cold_rounds
    load(folder, options.device)  # the first load of a process also pays for imports and the CUDA context
    from tqdm import tqdm

    with tqdm(total=total * len(ARMS), unit="load") as bar:
        for number in range(total):
            cold = number >= options.rounds
            names = turned(ARMS, number)
            measured: dict[str, Any] = {"cold": cold, "order": names, "arms": {}}
            for name in names:
                before = drop_from_page_cache(folder / "model.safetensors") if cold else None
                with ARMS[name]():
                    seconds, peak, after = load(folder, options.device)
                measured["arms"][name] = {
                    "seconds": seconds,
                    "peak_bytes": peak,
                    "resident_before": before,
                    "resident_after": after,
                }
                bar.update()
            rounds.append(measured)

    results: dict[str, Any] = {"bytes": size, "rounds": rounds, "arms": {}}
    warm = [r["arms"] for r in rounds if not r["cold"]]
    cold = [r["arms"] for r in rounds if r["cold"]]
    bandwidth = pinned_bandwidth() if options.device == "cuda" else None
    results["pinned_host_to_device_bytes_per_s"] = bandwidth
    for name in ARMS:
        seconds = [arms[name]["seconds"] for arms in warm]
        rate = size / statistics.median(seconds)
        results["arms"][name] = {
            "seconds": spread(seconds),
            "ratio_to_nothing": spread([arms[name]["seconds"] / arms["nothing"]["seconds"] for arms in warm]),
            "gigabytes_per_s": rate / 1e9,
            "percent_of_pinned": 100 * rate / bandwidth if bandwidth else None,
            "cold_seconds": spread([arms[name]["seconds"] for arms in cold]) if cold else None,
            "cold_resident_after": spread([arms[name]["resident_after"] for arms in cold]) if cold else None,
            "peak_bytes": sorted({arms[name]["peak_bytes"] for arms in warm}),
        }
    results["hooks_microseconds"] = hooks(folder, options.device, options.rounds)
    configuration = {**vars(options), "cache": None, "out": None, "hooks": None, "model": SIZES[options.size]}
    path = write(f"gpu-load-{options.size}", configuration, results, options.out)
    plot(path, results)
    report(path, results)


def checkpoint(size: str, cache: Path, device: str) -> Path:
    """The folder of the text encoder, written on first use: random bfloat16 weights, drawn on `device`."""
    import torch
    from safetensors.torch import save_file
    from transformers import UMT5Config, UMT5EncoderModel

    folder = cache / f"wan-umt5-{size}" / "text_encoder"
    if (folder / "model.safetensors").exists():
        return folder
    config = UMT5Config(**SIZES[size], tie_word_embeddings=True, dtype="bfloat16")
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in UMT5EncoderModel(config).state_dict().items() if key != KEY}
    needed = 2 * sum(shape.numel() for shape in shapes.values())
    cache.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(cache).free < needed * 1.05:
        stop(
            f"{cache} has {shutil.disk_usage(cache).free / 1e9:.1f} GB free, the checkpoint takes {needed / 1e9:.1f} GB"
        )
    generator = torch.Generator(device).manual_seed(0)
    tensors = {
        key: torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).mul_(0.05).cpu()
        for key, shape in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = ["UMT5EncoderModel"]
    config.save_pretrained(folder)
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**text, "tie_word_embeddings": False}))
    save_file(tensors, folder / "part", {"format": "pt"})
    (folder / "part").replace(folder / "model.safetensors")
    return folder


def load(folder: Path, device: str) -> tuple[float, int, float]:
    """One load, checked.

    Returns its seconds, the peak bytes that torch allocated on the GPU, and the share of the file in the page cache
    after it.
    """
    import torch
    from safetensors import safe_open
    from transformers import UMT5EncoderModel

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = UMT5EncoderModel.from_pretrained(folder, device_map=device, dtype="auto")
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    after = resident(folder / "model.safetensors")
    embedding = model.get_parameter(KEY)
    with safe_open(folder / "model.safetensors", "pt") as file:
        rows = file.get_slice(SOURCE)[:8]
    assert torch.equal(embedding[:8].cpu(), rows), "the encoder does not hold what the file stores"
    assert embedding.data_ptr() == model.get_parameter(SOURCE).data_ptr()
    del model, embedding
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return seconds, peak, after


@contextmanager
def with_tiedquiet() -> Iterator[None]:
    import tiedquiet

    with tiedquiet.enable("on"):
        yield
    tiedquiet.disable()


ARMS: dict[str, Callable[[], Any]] = {
    "nothing": nothing,
    "tiedquiet": with_tiedquiet,
    "record filter": record_filter,
    "verbosity error": verbosity_error,
    "nothing again": nothing,
}


def hooks(folder: Path, device: str, rounds: int) -> dict[str, Any]:
    """What tiedquiet's own part of a load takes, the first load of a process and later ones, in loads of their own."""
    code = [
        sys.executable,
        "-m",
        "benchmarks.load.gpu",
        "--hooks",
        str(folder),
        "--device",
        device,
        "--rounds",
        str(rounds),
    ]
    loads = json.loads(subprocess.check_output(code, text=True).splitlines()[-1])
    later = loads[1:]
    return {
        "first": loads[0]["own"],
        "later": spread([load["own"] for load in later]),
        "operations": loads[0]["watched"],
        "watching": spread([load["watching"] for load in later]),
        "loop": spread([load["loop"] for load in later]),
    }


def time_hooks(folder: Path, device: str, rounds: int) -> None:
    """In a process of its own: print one line of JSON, microseconds of each load."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    clocks = Clocks()
    loads = []
    for _ in range(rounds + 1):
        clocks.clear()
        load(folder, device)
        seconds = {"own": clocks.own, "watching": clocks.watching, "loop": plain_loop()}
        loads.append({"watched": clocks.watched, **{what: 1e6 * took for what, took in seconds.items()}})
    print(json.dumps(loads))


def plain_loop() -> float:
    """Seconds of 10,000 additions in Python: one process after another, a shared host runs them at half the speed."""
    start, total = time.perf_counter(), 0
    for number in range(10_000):
        total += number
    return time.perf_counter() - start


def pinned_bandwidth() -> float:
    """Bytes per second of a copy of 1 GiB from pinned memory to the GPU, best of 10."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return source.numel() / best


def drop_from_page_cache(path: Path) -> float:
    """Ask the kernel to forget the file's pages; returns the share of it that is still resident, measured."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return resident(path)


def resident(path: Path) -> float:
    """The share of a file that the page cache has, by mincore."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        with mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
            pages = -(-size // mmap.PAGESIZE)
            resident = (ctypes.c_ubyte * pages)()
            window = (ctypes.c_char * size).from_buffer(mapped)
            address = ctypes.c_void_p(ctypes.addressof(window))
            failed = ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(size), resident)
            del window
        if failed:
            return float("nan")
        return sum(byte & 1 for byte in bytes(resident)) / pages
    finally:
        os.close(descriptor)


def plot(path: Path, results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    warm = [r["arms"] for r in results["rounds"] if not r["cold"]]
    names = list(ARMS)
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(PAGE_INCHES, 6.4), sharex=True, constrained_layout=True)
    seconds = [[arms[name]["seconds"] for arms in warm] for name in names]
    ratios = [[arms[name]["seconds"] / arms["nothing"]["seconds"] for arms in warm] for name in names]
    labels = "seconds per load, warm page cache", "ratio to `nothing` of the same round"
    for axis, values, label in zip((upper, lower), (seconds, ratios), labels, strict=True):
        for place, (name, points) in enumerate(zip(names, values, strict=True)):
            color = "tab:green" if name == "tiedquiet" else "tab:gray"
            axis.scatter([place] * len(points), points, s=18, alpha=0.6, color=color)
            axis.hlines(statistics.median(points), place - 0.3, place + 0.3, color=color, linewidth=2)
        axis.set_xticks(range(len(names)), names)
        axis.set_ylabel(label)
        axis.grid(axis="y", alpha=0.3)
    lower.axhline(1, color="black", linewidth=0.8)
    content = json.loads(path.read_text())
    used = content["versions"]
    stack = f"transformers {used['transformers']}, torch {used['torch']}"
    figure.suptitle(f"{results['bytes'] / 1e9:.2f} GB, {content['hardware']}, {stack}; bars: medians", fontsize=10)
    figure.savefig(path.with_suffix(".png"), dpi=150)


def report(path: Path, results: dict[str, Any]) -> None:
    print(
        "| arm | seconds, median (min to max) | ratio to nothing, median (min to max) | GB/s | peak bytes on the GPU |"
    )
    print("| --- | --- | --- | --- | --- |")
    for name, arm in results["arms"].items():
        peak = ", ".join(f"{value:,}" for value in arm["peak_bytes"])
        cells = [name, show(arm["seconds"]), show(arm["ratio_to_nothing"]), f"{arm['gigabytes_per_s']:.2f}", peak]
        print(f"| {' | '.join(cells)} |")
    for name, arm in results["arms"].items():
        if cold := arm["cold_seconds"]:
            pages = f"{100 * arm['cold_resident_after']['median']:.3f} % of the file read"
            print(f"cold, {name}: {cold['median']:.2f} s ({cold['min']:.2f} to {cold['max']:.2f}), {pages}")
    own = results["hooks_microseconds"]
    print(
        f"tiedquiet's own part of a load: {show(own['later'], digits=0)} µs, of a process's first {own['first']:.0f} µs"
    )
    print(f"10,000 additions in Python: {show(own['loop'], digits=0)} µs")
    print(f"operations watched: {own['operations']}, {show(own['watching'], digits=0)} µs in all")
    if bandwidth := results["pinned_host_to_device_bytes_per_s"]:
        print(f"pinned host-to-device: {bandwidth / 1e9:.1f} GB/s")
    print(path)


if __name__ == "__main__":
    main()

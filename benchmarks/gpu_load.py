"""GPU load with and without tiedquiet, interleaved in one process.

    python benchmarks/gpu_load.py                      # UMT5-XXL shape, 11.36 GB, on the GPU
    python benchmarks/gpu_load.py --size tiny --device cpu --rounds 3 --cold-rounds 1

Writes (once, cached) the text encoder folder of a Wan pipeline with random weights: only `shared.weight` is stored and
`tie_word_embeddings` is false, as the published ones are. Each round loads it once per arm, in rotating order:
`nothing` twice (the second is the noise of the baseline against itself), tiedquiet, a `logging.Filter` that drops LOAD
REPORT records, and `set_verbosity_error()`. Ratios are taken within a round. Every load is checked: tied, and equal to
what was stored.
"""

import ctypes
import gc
import json
import mmap
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.record import arguments, show, spread, stop, write
from benchmarks.silencers import nothing, record_filter, verbosity_error

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
    options = parser.parse_args()
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
            names = list(ARMS)
            names = names[number % len(names) :] + names[: number % len(names)]
            measured: dict[str, Any] = {"cold": cold, "order": names, "arms": {}}
            for name in names:
                resident = drop_from_page_cache(folder / "model.safetensors") if cold else None
                with ARMS[name]():
                    seconds, peak = load(folder, options.device)
                measured["arms"][name] = {"seconds": seconds, "peak_bytes": peak, "resident_before": resident}
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
            "peak_bytes": sorted({arms[name]["peak_bytes"] for arms in warm}),
        }
    results["hooks_microseconds"] = hooks(folder, options.device, options.rounds)
    configuration = {**vars(options), "cache": None, "out": None, "model": SIZES[options.size]}
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


def load(folder: Path, device: str) -> tuple[float, int]:
    """One load, checked; returns its seconds and the peak bytes that torch allocated on the GPU."""
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
    embedding = model.get_parameter(KEY)
    with safe_open(folder / "model.safetensors", "pt") as file:
        rows = file.get_slice(SOURCE)[:8]
    assert torch.equal(embedding[:8].cpu(), rows), "the encoder does not hold what the file stores"
    assert embedding.data_ptr() == model.get_parameter(SOURCE).data_ptr()
    del model, embedding
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return seconds, peak


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


def hooks(folder: Path, device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds that tiedquiet's own part of a load takes, in loads of their own.

    The GPU is brought to rest before each: what the loader still has to copy is not the hook's cost.
    """
    import torch

    import tiedquiet
    from tiedquiet import patch

    spent: dict[str, list[float]] = {"record": [], "report": []}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name].append((time.perf_counter() - start) * 1e6)
            return result

        return wrapper

    begin, plan = patch.proof.begin, patch._plan_report
    patch.proof.begin, patch._plan_report = timed("record", begin), timed("report", plan)
    try:
        with tiedquiet.enable("on"):
            for _ in range(rounds):
                load(folder, device)
    finally:
        patch.proof.begin, patch._plan_report = begin, plan
        tiedquiet.disable()
    assert len(spent["record"]) == len(spent["report"]) == rounds
    both = [a + b for a, b in zip(spent["record"], spent["report"], strict=True)]
    return {"record": spread(spent["record"]), "report": spread(spent["report"]), "both": spread(both)}


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
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    seconds = [[arms[name]["seconds"] for arms in warm] for name in names]
    ratios = [[arms[name]["seconds"] / arms["nothing"]["seconds"] for arms in warm] for name in names]
    labels = "seconds per load, warm page cache", "ratio to `nothing` of the same round"
    for axis, values, label in zip((left, right), (seconds, ratios), labels, strict=True):
        for place, (name, points) in enumerate(zip(names, values, strict=True)):
            color = "tab:green" if name == "tiedquiet" else "tab:gray"
            axis.scatter([place] * len(points), points, s=18, alpha=0.6, color=color)
            axis.hlines(statistics.median(points), place - 0.3, place + 0.3, color=color, linewidth=2)
        axis.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
        axis.set_ylabel(label)
        axis.grid(axis="y", alpha=0.3)
    right.axhline(1, color="black", linewidth=0.8)
    content = json.loads(path.read_text())
    used = content["versions"]
    stack = f"transformers {used['transformers']}, torch {used['torch']}"
    figure.suptitle(f"Loading {results['bytes'] / 1e9:.2f} GB: {content['hardware']}, {stack}; bars: medians")
    figure.savefig(path.with_suffix(".png"), dpi=120)


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
            print(f"cold, {name}: {cold['median']:.2f} s ({cold['min']:.2f} to {cold['max']:.2f})")
    own = results["hooks_microseconds"]["both"]
    print(f"tiedquiet's hooks: {own['median']:.0f} µs per load ({own['min']:.0f} to {own['max']:.0f})")
    if bandwidth := results["pinned_host_to_device_bytes_per_s"]:
        print(f"pinned host-to-device: {bandwidth / 1e9:.1f} GB/s")
    print(path)


if __name__ == "__main__":
    main()

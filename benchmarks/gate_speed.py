"""How fast the gate compares a model with its files: beside sha256sum, reading, loading and a plain copy.

    python -m benchmarks.gate_speed                     # 0.3 GB, 11.36 GB, 100,000 small tensors; 12 GB of disk
    python -m benchmarks.gate_speed --sizes small many  # without the large one

The files are made on first use and kept: the text encoder of benchmarks/load/gpu.py in two of its sizes, and a GPT-2 of
very many very small layers. A round takes each way once, in rotating order; ratios are taken within a round. The model
is loaded anew each time, which on a CPU maps the file and reads nothing: comparing is the first to touch it. That of
very many tensors is loaded once. Each comparison is checked: every tensor is held. In a cold round the page cache is
told to forget the file before each way. With a GPU, the model is also loaded onto it and compared there.
"""

import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.load import gpu as gpu_load
from benchmarks.record import arguments, processor, show, spread, stop, turned, write

MANY = "many"
SIZES = (*gpu_load.SIZES, MANY)
WINDOW = 1 << 30  # bytes that are copied again and again: no cache holds them
COMPARING, LOADING = "comparing", "loading"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["small", "xxl", MANY], help=f"of {', '.join(SIZES)}")
    parser.add_argument("--tensors", type=int, default=100_000, help="how many `many` has (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="warm rounds (default: %(default)s)")
    parser.add_argument("--cold-rounds", type=int, default=1, help="with the page cache dropped (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/tiedquiet-benchmarks").expanduser())
    options = parser.parse_args()
    if unknown := [size for size in options.sizes if size not in SIZES]:
        stop(f"no size {unknown[0]!r}; there are {', '.join(SIZES)}")
    if options.rounds < 1 or options.cold_rounds < 0 or options.tensors < 12:
        stop("at least one warm round, no negative number of cold ones, and at least 12 tensors")
    import torch
    import transformers

    import tiedquiet

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {"processor": processor(), "threads": torch.get_num_threads(), "sizes": {}}
    with tiedquiet.enable("on"):
        for size in options.sizes:
            if size == MANY:
                folder = many(options.tensors, options.cache)
            else:
                folder = gpu_load.checkpoint(size, options.cache, device)
            results["sizes"][size] = measure(size, folder, options, device)
    configuration = {**vars(options), "cache": None, "out": None}
    path = write("gate-speed", configuration, results, options.out)
    plot(path, results)
    report(results)
    print(path)


def many(count: int, cache: Path) -> Path:
    """A folder with about so many tensors of at most 2 KB, written on first use."""
    import torch
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = cache / f"gpt2-{count}"
    if not (folder / "model.safetensors").exists():
        config = GPT2Config(
            n_layer=count // 12, n_embd=16, n_head=1, vocab_size=32, n_positions=32, bos_token_id=0, eos_token_id=0
        )
        with torch.device("meta"):
            state = GPT2LMHeadModel(config).state_dict()
        generator = torch.Generator().manual_seed(0)
        tensors = {
            name: torch.randn(tensor.shape, generator=generator)
            for name, tensor in state.items()
            if name != "lm_head.weight"
        }
        config.architectures = ["GPT2LMHeadModel"]
        config.save_pretrained(folder)
        save_file(tensors, folder / "part", {"format": "pt"})
        (folder / "part").replace(folder / "model.safetensors")
    return folder


def measure(size: str, folder: Path, options: Any, device: str) -> dict[str, Any]:
    """Every way in every round, seconds; what the first comparison of a process pays besides is not counted."""
    path = folder / "model.safetensors"
    kept, loading = load(folder, "cpu")
    before = anonymous()
    with sampled() as seen:
        held = compare(kept)[1]
    more = max(seen) - before
    if size != MANY:  # to load very many tensors takes far longer than to compare them
        kept = None
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds + (options.cold_rounds if kept is None else 0)):
        is_cold = number >= options.rounds
        found: dict[str, float] = {}
        resident: list[float] = []
        ways = ways_of(folder, found, kept, device, is_cold)
        for way in turned(ways, number):
            gc.collect()  # what is mapped, the page cache does not forget
            if is_cold:
                resident.append(gpu_load.drop_from_page_cache(path))
            way()
        rounds.append({"cold": is_cold, "seconds": found, "resident_before": resident})
    return {
        "bytes": path.stat().st_size,
        "tensors": held,
        "rounds": rounds,
        "by_threads": {} if kept is not None else threads_of(folder, min(2, options.rounds)),
        "first_loading_seconds": loading,
        "anonymous_bytes_at_most_more": more,
        "largest_tensor_bytes": largest(path),
    }


def ways_of(folder: Path, found: dict[str, float], kept: Any, device: str, is_cold: bool) -> list[Callable[[], None]]:
    """What is measured in a round; each writes its seconds to `found`. A model that is kept is not loaded anew."""
    path = folder / "model.safetensors"

    def gate(device: str) -> None:
        end = "" if device == "cpu" else " on the GPU"
        model = kept
        if model is None:
            model, found[LOADING + end] = load(folder, device)
        found[COMPARING + end] = compare(model)[0]

    def reading() -> None:
        found["reading"] = timed(partial(read_file, path))

    def hashing() -> None:
        found["sha256sum"] = timed(partial(sha256, path))

    def copying() -> None:
        found["copying"] = copy(path.stat().st_size)

    if is_cold:
        return [partial(gate, "cpu"), reading]
    ways = [partial(gate, "cpu"), reading, hashing, copying]
    return [*ways, partial(gate, device)] if device != "cpu" and kept is None else ways


def load(folder: Path, device: str) -> tuple[Any, float]:
    """A model, loaded as `check` does it, and the seconds that it took."""
    import torch
    from transformers import GPT2LMHeadModel, UMT5EncoderModel

    loader = GPT2LMHeadModel if folder.name.startswith("gpt2") else UMT5EncoderModel
    start = time.perf_counter()
    model = loader.from_pretrained(folder, device_map=device, dtype="auto")
    if device != "cpu":
        torch.cuda.synchronize()
    return model, time.perf_counter() - start


def compare(model: Any) -> tuple[float, int]:
    """The seconds of comparing a model with its files, and how many tensors are held: all of them."""
    from tiedquiet.gate.compare import compare
    from tiedquiet.gate.load import undo, undo_anew
    from tiedquiet.proof import record
    from tiedquiet.proof.files import Checkpoint

    known = record.of(model)
    checkpoint = Checkpoint(None, known.files, model.base_model_prefix)
    conversions = getattr(model, "_weight_conversions", None) or ()
    start = time.perf_counter()
    result = compare(model, known, checkpoint, [partial(undo, model), partial(undo_anew, model)], conversions)
    seconds = time.perf_counter() - start
    assert result.held == result.total > 0, "the model does not hold what the file stores"
    return seconds, result.held


def timed(way: Callable[[], object]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def read_file(path: Path) -> None:
    """From first to last byte, by one thread, into one buffer."""
    buffer = bytearray(1 << 24)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def sha256(path: Path) -> None:
    subprocess.run(["sha256sum", path], check=True, stdout=subprocess.DEVNULL)


def copy(count: int) -> float:
    """Seconds for a copy of so many bytes from memory to memory, by as many threads as torch computes with."""
    import torch

    window = min(WINDOW, count)
    source, target = torch.ones(window, dtype=torch.uint8), torch.ones(window, dtype=torch.uint8)
    start = time.perf_counter()
    for place in range(0, count, window):
        length = min(window, count - place)
        target[:length].copy_(source[:length])
    return time.perf_counter() - start


def threads_of(folder: Path, rounds: int) -> dict[str, Any]:
    """The comparing and the copy by one thread, two, four, ... up to what torch takes; seconds."""
    import torch

    most = torch.get_num_threads()
    counts = [count for count in (1, 2, 4, 8, 16, 32) if count < most] + [most]
    found: dict[str, Any] = {str(count): {COMPARING: [], "copying": []} for count in counts}
    size = (folder / "model.safetensors").stat().st_size
    try:
        for count in counts * rounds:
            torch.set_num_threads(count)
            found[str(count)][COMPARING].append(compare(load(folder, "cpu")[0])[0])
            found[str(count)]["copying"].append(copy(size))
    finally:
        torch.set_num_threads(most)
    return found


def anonymous() -> int:
    """Bytes of this process that no file backs; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


@contextmanager
def sampled() -> Iterator[list[int]]:
    seen, over = [anonymous()], threading.Event()

    def look() -> None:
        while not over.wait(0.002):
            seen.append(anonymous())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def largest(path: Path) -> int:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return max(
        end - start for start, end in (entry["data_offsets"] for name, entry in header.items() if name[0] != "_")
    )


def medians(measured: dict[str, Any], is_cold: bool) -> dict[str, dict[str, float]]:
    """The spread of each way's seconds over the rounds."""
    rounds = [one["seconds"] for one in measured["rounds"] if one["cold"] is is_cold]
    return {way: spread([seconds[way] for seconds in rounds]) for way in (rounds[0] if rounds else ())}


def report(results: dict[str, Any]) -> None:
    print(f"{results['processor']}, {results['threads']} threads")
    print("| size | way | seconds, median (min to max) | GB/s | its time to comparing's in the same round |")
    print("| --- | --- | --- | --- | --- |")
    for size, measured in results["sizes"].items():
        for is_cold in (False, True):
            rounds = [one["seconds"] for one in measured["rounds"] if one["cold"] is is_cold]
            for way, seconds in medians(measured, is_cold).items():
                rate = measured["bytes"] / seconds["median"] / 1e9
                ratio = show(spread([one[way] / one[COMPARING] for one in rounds]), digits=2)
                label = f"{size}, {measured['bytes'] / 1e9:.2f} GB, {measured['tensors']:,} tensors"
                print(f"| {label} | {way}{', cold' * is_cold} | {show(seconds)} | {rate:.2f} | {ratio} |")
    for size, measured in results["sizes"].items():
        for count, found in measured["by_threads"].items():
            rates = [f"{way} {measured['bytes'] / min(seconds) / 1e9:.2f} GB/s" for way, seconds in found.items()]
            print(f"{size}, threads: {count}: at best {', '.join(rates)}")
        more, most = measured["anonymous_bytes_at_most_more"], measured["largest_tensor_bytes"]
        print(
            f"{size}: loaded first in {measured['first_loading_seconds']:.2f} s; "
            f"comparing took at most {more / 1e6:.1f} MB that cannot be reclaimed; "
            f"the largest tensor has {most / 1e6:.1f} MB"
        )


def plot(path: Path, results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    sizes = {size: measured for size, measured in results["sizes"].items() if size != MANY}
    ways = ("sha256sum", "reading", "copying", COMPARING)
    for place, way in enumerate(ways):
        for shift, measured in enumerate(sizes.values()):
            rounds = [one["seconds"] for one in measured["rounds"] if not one["cold"]]
            rates = [measured["bytes"] / one[way] / 1e9 for one in rounds]
            label = f"{measured['bytes'] / 1e9:.2f} GB" if place == 0 else None
            left.scatter([place + 0.2 * shift] * len(rates), rates, s=24, alpha=0.7, color=f"C{shift}", label=label)
    left.set_xticks(range(len(ways)), ways)
    left.set_ylabel("GB/s, warm page cache")
    left.set_ylim(bottom=0)
    for shift, measured in enumerate(sizes.values()):
        for style, way in (("-", COMPARING), (":", "copying")):
            found = {int(count): min(seconds[way]) for count, seconds in measured["by_threads"].items()}
            rates = [measured["bytes"] / seconds / 1e9 for seconds in found.values()]
            label = f"{way}, {measured['bytes'] / 1e9:.2f} GB"
            right.plot(list(found), rates, f"o{style}", color=f"C{shift}", label=label)
    right.set_xlabel("threads")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_ylabel("GB/s, best round")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.grid(axis="y", alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    content = json.loads(path.read_text())
    stack = f"transformers {content['versions']['transformers']}, torch {content['versions']['torch']}"
    figure.suptitle(f"Comparing a model with its file: {results['processor']}, {stack}")
    figure.savefig(path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()

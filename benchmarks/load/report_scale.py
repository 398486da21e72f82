"""What tiedquiet costs as the report grows: 1 to 1,000,000 MISSING keys, 0 to 10,000 declared ties.

    python -m benchmarks.load.report_scale                       # some ten minutes, 5 GB of memory at the last size
    python -m benchmarks.load.report_scale --max-keys 10000

Each point is a real `from_pretrained` of a model of transformer-like layers (ten tensors each, in a module of its own)
whose checkpoint holds the embedding alone. A clock lies on either side of each of tiedquiet's wrappers, so that its
part of the call (outer less inner) is told from transformers' own, in the same call. It is held against two costs of
transformers: making the report, and the whole load. Every load is checked: what is tied is confirmed, what is missing
is reported.
"""

import gc
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.clocks import Clocks
from benchmarks.record import PAGE_INCHES, arguments, spread, stop, unseen, write

LAYER = ("q", "k", "v", "o", "gate", "up", "down", "norm1", "norm2", "norm3")
FORMS = ("names", "pattern")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--max-keys", type=int, default=1_000_000, help="the most MISSING keys (default: %(default)s)")
    parser.add_argument("--max-ties", type=int, default=10_000, help="the most declared ties (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="loads per point; fewer from 100,000 keys on")
    options = parser.parse_args()
    if options.max_keys < 1 or options.max_ties < 1 or options.rounds < 1:
        stop("--max-keys, --max-ties and --rounds are at least 1")
    import transformers
    from tqdm import tqdm

    transformers.logging.disable_progress_bar()
    clocks = Clocks()
    keys = [(10**i, 0, "none") for i in range(7) if 10**i <= options.max_keys]
    ties = [(0, 10**i, form) for form in FORMS for i in range(5) if 10**i <= options.max_ties]
    points = []
    load(10, 10, "names", clocks)  # imports and caches
    for missing, tied, form in tqdm(keys + ties, unit="size"):
        size = max(missing, tied)
        rounds = options.rounds if size < 100_000 else max(1, options.rounds // (3 if size < 1_000_000 else 7))
        runs = [load(missing, tied, form, clocks) for _ in range(rounds)]
        points.append(
            {
                "missing": missing,
                "ties": tied,
                "form": form,
                **{part: spread([run[part] for run in runs]) for part in runs[0]},
                "share_of_report": statistics.median(run["own"] / run["report"] for run in runs),
                "share_of_load": statistics.median(run["own"] / run["load"] for run in runs),
            }
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    configuration = {**vars(options), "out": None, "layer": LAYER}
    path = write("report-scale", configuration, {"points": points, "peak_memory_kib": peak}, options.out)
    plot(path, points)
    report(points)
    print(path)


def load(missing: int, ties: int, form: str, clocks: Clocks) -> dict[str, float]:
    """Load a model with so many MISSING keys and so many ties, checked; returns seconds per part."""
    import torch
    from safetensors.torch import save_file
    from transformers import PreTrainedConfig, PreTrainedModel

    from tests.checkpoints import printing

    class Weight(torch.nn.Module):
        def __init__(self, rows: int = 1) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(rows))

    class Layer(torch.nn.Module):
        def __init__(self, names: tuple[str, ...]) -> None:
            super().__init__()
            for name in names:
                setattr(self, name, Weight())

    class Config(PreTrainedConfig):
        model_type = "scale"

    class Model(PreTrainedModel):
        config_class = Config
        _tied_weights_keys = {
            "none": None,
            "names": {f"tied.{i}.weight": f"stored.{i}.weight" for i in range(ties)},
            "pattern": {r"tied\.\d+": "stored"},
        }[form]

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.embed = Weight(8)
            whole, rest = divmod(missing, len(LAYER))
            self.layers = torch.nn.ModuleList(Layer(LAYER) for _ in range(whole))
            self.rest = Layer(LAYER[:rest])
            self.stored = torch.nn.ModuleList(Weight() for _ in range(ties))
            self.tied = torch.nn.ModuleList(Weight() for _ in range(ties))
            self.post_init()

        def _init_weights(self, module: torch.nn.Module) -> None:
            if isinstance(module, Weight):
                torch.nn.init.zeros_(module.weight)

    with tempfile.TemporaryDirectory() as folder:
        Config(tie_word_embeddings=True, architectures=["Model"]).save_pretrained(folder)
        stored = {f"stored.{i}.weight": torch.full((1,), float(i + 1)) for i in range(ties)}
        save_file({"embed.weight": torch.ones(8), **stored}, Path(folder, "model.safetensors"), {"format": "pt"})
        with printing() as printed, unseen():
            gc.collect()
            clocks.clear()
            # As timeit does: a full collection takes some 0.3 s, and falls on whoever allocates at that moment.
            gc.disable()
            start = time.perf_counter()
            model, info = Model.from_pretrained(folder, output_loading_info=True)
            seconds = time.perf_counter() - start
            gc.enable()
    assert len(info["missing_keys"]) in (missing, missing + ties)
    assert all(model.tied[i].weight is model.stored[i].weight for i in range(ties))
    # Newer releases leave declared ties out of the missing keys themselves: then there is no row to confirm.
    assert len(printed.confirmed) == (len(info["missing_keys"]) > missing), printed.confirmed
    return {"own": clocks.own, "report": clocks.below["report"], "watching": clocks.watching, "load": seconds}


def plot(path: Path, points: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(PAGE_INCHES, 3.6), sharey=True, constrained_layout=True)
    titles = {"none": "MISSING keys", "names": "ties, by name", "pattern": "ties, by one pattern"}
    for axis, (form, title) in zip(axes, titles.items(), strict=True):
        chosen = [point for point in points if point["form"] == form]
        sizes = [max(point["missing"], point["ties"]) for point in chosen]
        for part, color in (("load", "tab:gray"), ("report", "tab:blue"), ("own", "tab:green")):
            label = {"load": "the whole load", "report": "making the report", "own": "tiedquiet"}[part]
            seconds = [point[part]["median"] for point in chosen]
            low = [point[part]["min"] for point in chosen]
            high = [point[part]["max"] for point in chosen]
            axis.loglog(sizes, seconds, "o-", color=color, label=label, markersize=4)
            axis.fill_between(sizes, low, high, color=color, alpha=0.2)
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds, median and range")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=150)


def report(points: list[dict[str, Any]]) -> None:
    print("| MISSING keys | declared ties | tiedquiet, ms | report, ms | load, ms | of the report | of the load |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for point in points:
        times = [f"{1e3 * point[part]['median']:,.3f}" for part in ("own", "report", "load")]
        shares = [f"{100 * point[share]:.2f} %" for share in ("share_of_report", "share_of_load")]
        ties = f"{point['ties']:,} by {point['form']}" if point["ties"] else "0"
        print(f"| {' | '.join([format(point['missing'], ','), ties, *times, *shares])} |")


if __name__ == "__main__":
    main()

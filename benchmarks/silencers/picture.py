"""The two plots: rows are situations, columns are ways, and a cell has one stripe for each release."""

from pathlib import Path
from typing import Any

from benchmarks.record import PAGE_INCHES
from benchmarks.silencers.tables import (
    ALARM,
    BOTH,
    FALSE,
    HIDDEN,
    MISSED,
    NOTICED,
    QUIET,
    RIGHT,
    Results,
    releases,
)

GREEN, PALE, YELLOW, RED, PURPLE = "#5aae61", "#d9f0d3", "#fee08b", "#d73027", "#762a83"
COLOURS = {
    RIGHT: GREEN, FALSE: YELLOW, HIDDEN: RED, BOTH: PURPLE,
    NOTICED: GREEN, QUIET: PALE, ALARM: YELLOW, MISSED: RED,
}  # fmt: skip
WORDS = {
    "report": {
        RIGHT: "right", FALSE: "a false row stays", HIDDEN: "something true is hidden", BOTH: "both",
    },
    "corruption": {
        NOTICED: "corrupt, noticed", QUIET: "sound, quiet", MISSED: "corrupt, missed", ALARM: "sound, false alarm",
    },
}  # fmt: skip
POINTS = 9


def plot(path: Path, results: Results) -> list[Path]:
    """Draw both tables beside a result file; returns where."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = []
    for table, words in WORDS.items():
        ways = results[table]
        names = list(next(iter(ways.values())))
        figure, axis = plt.subplots(figsize=(PAGE_INCHES, 2.9 + 0.27 * len(names)), constrained_layout=True)
        stripes(axis, ways, names)
        seen = {score for way in ways.values() for scores in way.values() for score in scores.values()}
        legend(figure, {score: word for score, word in words.items() if score in seen}, releases(results))
        paths.append(path.with_name(f"{path.stem}_{table}.png"))
        figure.savefig(paths[-1], dpi=150)
        plt.close(figure)
    return paths


def stripes(axis: Any, ways: dict[str, dict[str, dict[str, str]]], names: list[str]) -> None:
    from matplotlib.colors import ListedColormap

    scores = list(COLOURS)
    grid = [[scores.index(score) for way in ways.values() for score in way[name].values()] for name in names]
    per_way = len(grid[0]) // len(ways)
    colours = ListedColormap(list(COLOURS.values()))
    axis.imshow(grid, cmap=colours, vmin=0, vmax=len(scores) - 1, aspect="auto", interpolation="nearest")
    middle = [per_way * number + (per_way - 1) / 2 for number in range(len(ways))]
    axis.set_xticks(
        middle, [short(way) for way in ways], rotation=45, ha="left", rotation_mode="anchor", fontsize=POINTS
    )
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(names)), [name.replace("`", "") for name in names], fontsize=POINTS)
    axis.set_xticks([per_way * number - 0.5 for number in range(1, len(ways))], minor=True)
    axis.set_yticks([number - 0.5 for number in range(1, len(names))], minor=True)
    axis.grid(which="minor", color="white", linewidth=3)
    axis.tick_params(which="both", length=0)
    for side in axis.spines.values():
        side.set_visible(False)


def short(way: str) -> str:
    """A way as it fits above a column."""
    long = {
        '`warnings.filterwarnings("ignore")`': "filterwarnings",
        "`set_verbosity_error()`": "set_verbosity_error",
        "`set_verbosity_error()`, then `model.tie_weights()`": "… then tie_weights()",
        "`set_verbosity_error()`, reading `output_loading_info`": "… reading loading_info",
        "a filter for LOAD REPORT records": "a log filter",
        "the key in `_keys_to_ignore_on_load_missing`": "ignoring the key",
        "dropping what `_tied_weights_keys` covers": "dropping declared ties",
        "comparing logits by hand": "comparing logits",
        "`python -m tiedquiet check`": "tiedquiet check",
    }
    return long.get(way, way).replace("`", "")


def legend(figure: Any, words: dict[str, str], names: list[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=COLOURS[score], label=word) for score, word in words.items()]
    title = f"one stripe a release: {', '.join(names)}"
    figure.legend(
        handles=handles, title=title, loc="outside lower center", ncols=2, fontsize=POINTS, title_fontsize=POINTS,
        frameon=False,
    )  # fmt: skip

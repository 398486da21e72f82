"""`python -m tests.upstream`: what the patches of docs/upstream.md do, beside the programs of that page.

python -m tests.upstream             # how many of the idioms of tests/idioms/ are right with all of them together
python -m tests.upstream resumes     # what each class of the census loses on resume, without and with them
python -m tests.upstream parts       # which classes leave the parts of a weight with weight norm unwritten
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers

from tests.pages import ROOT, fenced, sections

RELEASES = {"transformers": "5.24.0", "diffusers": "0.42.1", "peft": "0.21.2"}  # of the page
# Of docs/upstream.md, 8.
WITH_WEIGHT_NORM = (
    "HubertModel", "SpeechT5ForSpeechToText", "VitsModel", "EncodecModel", "MusicgenForConditionalGeneration", "SEWModel",
    "UniSpeechModel", "Wav2Vec2Model", "Wav2Vec2ConformerModel", "WavLMModel",
)  # fmt: skip
BUGS = {title: text for title, text in sections(ROOT / "docs" / "upstream.md").items() if title[0].isdigit()}
PATCHES = {title: diff for title, text in BUGS.items() for diff in fenced(text, "diff")}


def packages(*patches: str) -> set[str]:
    """The packages that patches change."""
    return {name for patch in patches for name in re.findall(r"^\+\+\+ b/src/(\w+)/", patch, re.MULTILINE)}


def patched(folder: Path, *patches: str) -> Path:
    """A folder for PYTHONPATH with packages that are patched: links to the installed ones, and a few real files."""
    changed = {Path(name) for patch in patches for name in re.findall(r"^\+\+\+ b/src/(.*)$", patch, re.MULTILINE)}
    real = {parent for name in changed for parent in name.parents if parent.name}
    for parent in sorted(real):
        (folder / parent).mkdir(parents=True)
        for path in installed(parent).iterdir():
            name = parent / path.name
            if name in changed:
                (folder / name).write_bytes(path.read_bytes())
            elif name not in real and path.name != "__pycache__":
                (folder / name).symlink_to(path)
    for patch in patches:
        subprocess.run(["git", "apply", "-p2", "-"], cwd=folder, input=patch, text=True, check=True)
    return folder


def installed(path: Path) -> Path:
    """Where a folder of an installed package is."""
    spec = find_spec(path.parts[0])
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.joinpath(*path.parts[1:])


def program(*arguments: str, paths: tuple[Path, ...] = ()) -> list[dict[str, object]]:
    """The lines of JSON that a module prints, with these folders in front of all others."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def losses(*paths: Path) -> tuple[int, dict[str, str]]:
    """How many idioms there are, and what those that lose anything lose when they are loaded."""
    rows = program("tests.idioms", "--here", paths=paths)
    return len(rows), {
        str(row["name"]): str(row["true"]) for row in rows if re.search("lost|garbage", str(row["true"]))
    }


def with_and_without_all() -> tuple[int, dict[str, str], dict[str, str]]:
    """How many idioms there are, and what they lose without the patches and with all of them."""
    with tempfile.TemporaryDirectory() as folder:
        (number, before), (_, after) = losses(), losses(patched(Path(folder), *PATCHES.values()))
    return number, before, after


def idioms() -> int:
    number, before, after = with_and_without_all()
    for name, what in after.items():
        print(f"{name}: {what}" + ("" if name in before else " (with the patches only)"))
    print(f"of {number} idioms {len(before)} lose something on transformers {transformers.__version__}; ", end="")
    print(f"the patches put {len(before.keys() - after.keys())} right, and harm {len(after.keys() - before.keys())}")
    return int(bool(after.keys() - before.keys()))


def resumes(only: str = "") -> int:
    (patch,) = (diff for title, diff in PATCHES.items() if "on resume" in title)
    with tempfile.TemporaryDirectory() as folder:
        before = program("tests.upstream", "resumed", only)
        after = program("tests.upstream", "resumed", only, paths=(patched(Path(folder), patch),))
    for words, rows in (("released", before), ("patched", after)):
        tried = [row for row in rows if "lost" in row]
        lossy = [row for row in tried if row["lost"] or row["lost_of_best"]]
        print(
            f"{words}: {len(tried)} classes resumed, {len(lossy)} lose {sum(len(row['lost']) for row in tried)} tensors"
        )
    for row in after:
        if row.get("lost") or row.get("lost_of_best") or "reason" in row:
            print(json.dumps(row))
    return int(any(row.get("lost") or row.get("lost_of_best") for row in after))


def parts(only: str) -> int:
    """One line for each class with weight norm: how many of its parts nobody writes to if the file lacks them."""
    import torch
    from safetensors.torch import load_file, save_file

    from benchmarks import tiny_models
    from benchmarks.census.__main__ import prepare

    prepare()
    torch.use_deterministic_algorithms(True)  # what nobody wrote to is NaN
    for name in filter(re.compile(only).search, WITH_WEIGHT_NORM):
        cls = getattr(transformers, name)
        for shrink in tiny_models.attempts():
            try:
                config = tiny_models.default(cls.config_class)
                shrink(config)
                model = cls(config)
                break
            except Exception:
                continue
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            path = Path(folder, "model.safetensors")
            kept = {key: value for key, value in load_file(path).items() if "parametrizations" not in key}
            save_file(kept, path, {"format": "pt"})
            state = cls.from_pretrained(folder).state_dict()
        of_weights = [value for key, value in state.items() if "parametrizations" in key]
        unwritten = sum(not value.isfinite().all() for value in of_weights)
        print(json.dumps({"class": name, "parts": len(of_weights), "unwritten": unwritten}), flush=True)
    return 0


def resumed(only: str) -> int:
    """One line for each class that the census resumes: what a Trainer loses of its own checkpoint, tiedquiet off."""
    from benchmarks import tiny_models
    from benchmarks.census import loads
    from benchmarks.census.__main__ import prepare

    prepare()
    for name in tiny_models.modules_with_ties(only):
        try:
            module = importlib.import_module(name)
        except Exception:  # a class that needs a package that is not here
            continue
        for cls in (*tiny_models.declaring_classes(module), *tiny_models.classes_that_may_carry(module)):
            if not re.search(only, cls.__name__):
                continue
            try:
                with loads.limited(120), tempfile.TemporaryDirectory() as folder:
                    line = resume_of(cls, Path(folder))
            except tiny_models.NoTies:
                continue
            except Exception as error:
                line = {"reason": loads.reason(error)}
            print(json.dumps({"class": cls.__name__, **line}), flush=True)
    return 0


def resume_of(cls: type[Any], folder: Path) -> dict[str, Any]:
    from benchmarks.census import models, resume

    saved, base, checkpoint = models.Saved(cls), folder / "base", folder / "checkpoint"
    resume.prepare(saved, base, checkpoint, resume.by_trainer)
    truth = resume.Truth(saved, base, checkpoint)
    resumed = resume.resume(cls, base, checkpoint, "off")
    if resumed.failure is not None:
        raise resumed.failure
    best = resume.resume(cls, base, checkpoint, "off", is_best=True)
    return {"lost": sorted(truth.lost(resumed)), "lost_of_best": sorted(truth.lost(best)), "rows": sorted(resumed.rows)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.upstream", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="idioms", choices=["idioms", "resumes", "resumed", "parts"])
    parser.add_argument("only", nargs="?", default="", help="classes whose name has a match")
    options = parser.parse_args()
    if options.what == "idioms":
        return idioms()
    return {"resumes": resumes, "resumed": resumed, "parts": parts}[options.what](options.only)


if __name__ == "__main__":
    sys.exit(main())

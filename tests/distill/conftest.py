"""What the tests of the example share: prompts, a cache, a folder of bad input."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from accelerate.state import AcceleratorState

from tests.distill.running import CHECKPOINT, TWO, copied
from tiedquiet.distill import options
from tiedquiet.distill.options import parse
from tiedquiet.distill.train import __doc__ as DOC


@pytest.fixture(autouse=True)
def _own_run() -> Iterator[None]:
    """Accelerate keeps the first run's precision for all that follow in one process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one long test made, the others use; each finds what was made by its own settings."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def prompts(tmp_path: Path, cache: str) -> list[str]:
    """The options of a run on two prompts."""
    (tmp_path / "prompts.txt").write_text(TWO)
    return ["--prompts_file", str(tmp_path / "prompts.txt"), "--cache_dir", cache]


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    files = {
        "a_file": "",
        "empty.txt": "\n \n",
        "latin.txt": "caf\xe9",
        "none/readme": "",
        "jsonl/metadata.jsonl": '{"file_name": "a.gif"}\n',
        "broken/metadata.jsonl": "{\n",
        "list/metadata.jsonl": '{"file_name": "a_file", "text": "a"}\n[1]\n',
        "list/a_file": "",
        "number/metadata.jsonl": '{"file_name": 5, "text": "a"}\n',
        "absent/metadata.csv": "file_name,text\nnot_there.gif,a prompt\n",
        "rowless/metadata.csv": "file_name,text\n",
        "comma/metadata.csv": "file_name,text\nmetadata.csv,a cat, that runs\n",
        "quote/metadata.csv": 'file_name,text\nmetadata.csv,"a cat\nmetadata.csv,a dog\n',
        "halves/metadata.jsonl": '{"file_name": "metadata.jsonl", "text": "\\ud800"}\n',
        "noise/metadata.csv": "file_name,text\nnoise.mp4,a prompt\n",
        "noise/noise.mp4": "not a film",
        "short/metadata.csv": "file_name,text\nshort.png,a prompt\n",
        "run/args.json": json.dumps(
            {
                **options.settings(parse(DOC, ["--sample_guidance_scale_2", "3"])),
                "student_blocks": 6,
                "task_weight": 0.0,
                "seed": 7,
            }
        ),
        f"run/{CHECKPOINT}/x": "",
        f"lost/{CHECKPOINT}/x": "",
        "done/student/model_index.json": "{}",
        "torn/args.json": '{"seed"',
        f"torn/{CHECKPOINT}/x": "",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="latin-1")
    iio.imwrite(folder / "short/short.png", np.zeros((64, 64, 3), dtype=np.uint8))
    copied(folder / "one", transformer_2=[None, None], boundary_ratio=None)
    copied(folder / "image", _class_name="WanImageToVideoPipeline")
    shutil.rmtree(copied(folder / "part") / "vae")
    copied(folder / "two", boundary_ratio=None)
    copied(folder / "edge", transformer_2=[None, None])
    copied(folder / "encoder", text_encoder=["transformers", "Nonsense"])
    (copied(folder / "config") / "transformer/config.json").write_text("{")
    config = copied(folder / "unlike") / "transformer_2/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 5}))
    return folder

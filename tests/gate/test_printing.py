"""What strangers named is printed where a workflow's runner reads each line for commands."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from tests.checkpoints import t5
from tiedquiet.__main__ import main

# Names that a runner of GitHub would obey where they begin a line, or anywhere: ActionCommand.cs, which skips blanks.
COMMANDS = (
    "::add-mask::x",
    " ::stop-commands::x",
    "x##[add-mask]x",
    "###[add-mask]x",
    "##\ufe0f[add-mask]x",
    ":\u034f:x",
)


def are_obeyed(text: str) -> bool:
    lines = re.sub("[\u034f\ufe00-\ufe0f]", "", text).splitlines()  # it compares without what nobody sees
    return any(line.strip().startswith("::") or "##[" in line for line in lines)


@pytest.mark.parametrize("form", ["--all", "--json"])
def test_no_name_is_a_command_to_a_runner(
    form: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert all(map(are_obeyed, COMMANDS))
    path = good / "model.safetensors"
    save_file({**load_file(path), **{name: torch.ones(1) for name in COMMANDS}}, path, {"format": "pt"})
    pipe = tmp_path / "pipe"
    T5EncoderModel(t5()).save_pretrained(pipe / "text_encoder")
    index = {"text_encoder": ["transformers", "T5EncoderModel"]}
    parts = {name: ["transformers", name] for name in (*COMMANDS, ":")}  # the colon after a name may be the second
    (pipe / "model_index.json").write_text(json.dumps({**index, **parts}))
    modules = [{"path": name, "type": name} for name in COMMANDS]
    capsys.readouterr()
    for place, status in ((good, 0), (pipe, 1)):
        assert main(["check", str(place), form]) == status
        out, err = capsys.readouterr()
        assert (are_obeyed(out), err) == (False, "")
    if form == "--json":
        found = {component["component"]: component["class"] for component in json.loads(out)["components"]}
        assert parts.keys() < found.keys()
        assert all(found[name] == name for name in parts)  # what is escaped is equal once it is parsed
    for name in COMMANDS:
        config = json.loads((good / "config.json").read_text())
        (good / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
        assert main(["check", str(good)]) == 2
        (good / "modules.json").write_text(json.dumps(modules))
        assert main(["check", str(good), form]) == 2
        (good / "modules.json").unlink()
        assert not any(map(are_obeyed, capsys.readouterr()))

"""What `check` opens, imports and runs, seen by Python's audit hook, over folders that want more: docs/security.md."""

import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from tests.checkpoints import gpt2
from tests.gate.zoo import Zoo
from tests.pages import ROOT, sections
from tiedquiet.__main__ import main
from tiedquiet.gate import classes
from tiedquiet.gate.diagnosis import damage
from tiedquiet.gate.refusal import CannotCheck
from tiedquiet.gate.source import is_inside

# Runs in a process of its own, since an audit hook stays. What is imported beforehand is no business of a folder.
WATCHED = """
import io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from contextlib import suppress
import diffusers, encodings.unicode_escape, peft, transformers
for package in ("bitsandbytes", "compressed_tensors.compressors", "gguf"):  # quantisers, which bring what is theirs
    with suppress(ImportError):
        __import__(package)
from tiedquiet.__main__ import main

top, arguments = os.getcwd(), json.loads(sys.argv[1])
for name in ("good", "pipe"):
    with redirect_stdout(io.StringIO()):
        main(["check", name])
seen = {}
libraries = (sys.prefix, sys.base_prefix, "<frozen", *filter(None, sys.path))

def hook(event, given):
    if event == "open" and isinstance(given[0], (str, bytes)):
        path = os.path.abspath(os.fsdecode(given[0]))
        if not path.startswith((*libraries, "/proc/", "/sys/")) and path != os.devnull:
            seen.setdefault("open", []).append(path)
    elif event == "import":
        seen.setdefault("import", []).append(given[0])
    elif event == "exec":
        if not given[0].co_filename.startswith((*libraries, "<string>")):
            seen.setdefault("exec", []).append(given[0].co_filename)
    elif event.split(".")[0] in ("os", "subprocess", "socket", "shutil", "ctypes", "pty", "code", "pickle", "webbrowser"):
        if event not in ("os.listdir", "os.scandir"):
            seen.setdefault(event, []).append(repr(given))

out = {}
sys.addaudithook(hook)
for name, given in arguments.items():
    seen.clear()
    said, told = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(told):
        status = main(["check", *given])
    out[name] = {"status": status, "out": said.getvalue(), "err": told.getvalue(), "seen": {k: sorted(set(v)) for k, v in seen.items()}}
print(json.dumps(out))
"""


# Why some of them are refused: their status would be the same if something further in failed.
SAYS = {
    "dotted": "config.json names dotted.evil.Model, which transformers",
    "no_type": "its class is code that ships with the checkpoint; --trust-remote-code allows it to run",
    "kernel": "config.json names somebody/kernel, compiled code that transformers fetches from the hub and runs",
    "kernel_inside": "config.json names somebody/kernel@main:x, compiled code",
    "adapter_megatron": "adapter_config.json asks for megatron_core, a module that peft imports by its name",
    "pipe_library": "model_index.json names Model of evil, which is not an installed class",
    "shard_up": "which points outside the folder",
    "shard_link": "points outside the folder, to ",
    "config_link": "points outside the folder, to /etc/hostname",
    "other_weights": "points outside the folder, to ",
    "part_up": "model_index.json names ../good, which points outside the folder",
    "shard_fifo": "is not a regular file",
    "long_header": "has a header of 3,221,225,472 bytes, and the format allows 100,000,000",
    "bin_as_shard": "which is not a safetensors file",
    "bin_archive_name_subprocess": "pytorch_model.bin is a pickle that wants to run code when it is read (subproc",
    "bin_archive_reduce_system": "pytorch_model.bin is not a file of tensors that torch.save wrote",  # by its protocol
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


def run(*arguments: str, cwd: Path, **more: Any) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment.pop("TIEDQUIET", None)
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, **more
    )


@pytest.mark.slow
def test_what_strangers_made_is_read_and_not_run(zoo: Zoo) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    arguments = {name: zoo.arguments.get(name, [f"./{name}"]) for name in zoo.wanted}
    done = run("-c", WATCHED, json.dumps(arguments), cwd=zoo.top)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    opened, imported = documented("opened"), documented("imported")
    assert len(report) == len(zoo.wanted) > 100
    assert {name for name, says in SAYS.items() if says not in report[name]["err"]} == set()
    for name, found in report.items():
        assert found["status"] in zoo.wanted[name], (name, found)
        assert found["err"].count("\n") == int(found["status"] == 2), (name, found)
        assert all(c.isprintable() or c == "\n" for c in found["out"] + found["err"]), (name, found)
        assert "\n::" not in found["out"] + found["err"]
        seen = found["seen"]
        for path in map(Path, seen.pop("open", [])):
            assert any(fnmatch(path.name, pattern) for pattern in opened), (name, path)
            assert path.relative_to(zoo.top).parts[0] in (name, "good", "own_class"), (name, path)
            assert name.startswith("adapter") or path.relative_to(zoo.top).parts[0] == name, (name, path)
        for module in seen.pop("import", []):
            root = module.partition(".")[0]
            assert root in sys.stdlib_module_names or root in imported, (name, module)
        assert not seen, (name, seen)  # neither a process, nor a connection, nor code
    assert not Path(zoo.mark).exists()


def documented(what: str) -> list[str]:
    """The names in a row of the table of docs/security.md."""
    (row,) = (
        line
        for line in sections(ROOT / "docs" / "security.md")["What `check` opens, imports and runs"].splitlines()
        if line.startswith(f"| {what} |")
    )
    return re.findall(r"`(\S+?)`", row.split("|")[2])


@pytest.mark.slow
def test_nothing_of_the_current_folder_is_imported_and_nobody_is_asked(zoo: Zoo) -> None:
    """The folder has a `transformers.py` and an `accelerate.py` that leave a mark."""
    done = run("-m", "tiedquiet", "check", ".", cwd=zoo.top / "beside", input="y\n" * 9)
    assert (done.returncode, done.stderr) == (0, "")
    done = run("-m", "tiedquiet", "check", ".", cwd=zoo.top / "no_type", input="y\n" * 9)
    assert done.returncode == 2
    assert "[y/N]" not in done.stdout + done.stderr
    assert not Path(zoo.mark).exists()


def test_a_class_of_the_user_s_may_lie_in_the_current_folder(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine_at_home.py").write_text("from transformers import GPT2LMHeadModel\nclass Mine(GPT2LMHeadModel): pass\n")
    before = list(sys.path)
    assert main(["check", str(zoo.top / "good"), "--class", "mine_at_home.Mine"]) == 0
    assert sys.path == before


@pytest.mark.parametrize("by", ["path", "part"])
def test_the_links_of_the_hub_s_cache_are_followed(by: str, tmp_path: Path) -> None:
    repo = tmp_path / "models--some--model"
    snapshot = repo / "snapshots" / ("0" * 40)
    folder = snapshot / "text_encoder" if by == "part" else snapshot
    GPT2LMHeadModel(gpt2()).save_pretrained(folder)
    (repo / "blobs").mkdir()
    for path in list(folder.iterdir()):
        path.rename(repo / "blobs" / path.name)
        path.symlink_to(os.path.relpath(repo / "blobs" / path.name, folder))
    if by == "part":
        (snapshot / "model_index.json").write_text('{"text_encoder": ["transformers", "GPT2LMHeadModel"]}')
    assert main(["check", str(snapshot)]) == 0
    (folder / "config.json").unlink()
    (tmp_path / "config.json").write_text("{}")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    assert main(["check", str(snapshot)]) == 2


@pytest.mark.parametrize("version", ["2.9.1+cu128", "2.5.0"])
def test_a_pickle_is_not_opened_with_an_old_torch_unless_it_is_trusted(
    version: str, zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GPT2LMHeadModel.from_pretrained(zoo.top / "good")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(
        json.dumps({**json.loads((tmp_path / "config.json").read_text()), "architectures": ["GPT2LMHeadModel"]})
    )
    capsys.readouterr()
    monkeypatch.setattr(torch, "__version__", version)
    assert main(["check", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"tiedquiet: {tmp_path}: pytorch_model.bin is a pickle, and torch {version} does not read pickles safely"
    )
    assert "install torch 2.10 or newer" in error
    assert main(["check", str(tmp_path), "--trust-pickle"]) == 0
    monkeypatch.setattr(torch, "__version__", "2.10.0a0")
    assert main(["check", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("\0", r"\x00 is neither the name of a folder"),
        ("a\ud800", "is neither the name of a folder"),
        ("/dev/null", "is neither a folder nor"),
    ],
)
def test_what_is_no_folder(name: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", name]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("a.safetensors", True),
        ("a/b.safetensors", True),
        ("..a", True),
        ("", False),
        ("../a", False),
        ("a/../../b", False),
        ("/a", False),
        ("a\\..\\..\\b", False),
        ("C:a", False),
        ("\\\\host\\share\\a", False),
        ("a\0", False),
    ],
)
def test_which_names_stay_in_a_folder(name: str, stays: bool) -> None:
    """Asked of names in an index on the hub as well, of which no file is there yet."""
    assert is_inside(name) is stays


def test_a_json_file_that_is_too_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(100_000_001)
    assert main(["check", str(tmp_path)]) == 2
    assert "config.json has 100,000,001 bytes, too many for a JSON file" in capsys.readouterr().err


def test_a_header_that_is_too_large_is_not_read_to_say_what_is_wrong(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((3 << 30).to_bytes(8, "little"))
        file.truncate((3 << 30) + 8)
    assert list(damage(tmp_path)) == [
        "model.safetensors has a header of 3,221,225,472 bytes, and the format allows 100,000,000"
    ]


def test_a_class_that_its_library_cannot_import(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        @property
        def Model(self) -> None:
            raise RuntimeError("Failed to import:\nno module")

    monkeypatch.setattr(classes, "_library", lambda _: Library())
    with pytest.raises(CannotCheck, match="transformers cannot import Model: Failed to import: no module"):
        classes.named("transformers", "Model")


def test_without_diffusers_there_is_none_of_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert classes.named("diffusers", "UNet2DModel") is None
    assert not classes.is_of_diffusers(torch.nn.Linear)


def test_a_class_that_is_no_model(zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(zoo.top / "good"), "--class", "GPT2Config"]) == 2
    assert capsys.readouterr().err.endswith("cannot be loaded as GPT2Config: that is not a model\n")


def test_code_that_a_pipeline_s_model_names_runs_only_if_it_is_let(zoo: Zoo, tmp_path: Path) -> None:
    folder = shutil.copytree(zoo.top / "pipe", tmp_path / "pipe")
    path = folder / "text_encoder" / "config.json"
    config = {**json.loads(path.read_text()), "attn_implementation": "somebody/kernel"}
    path.write_text(json.dumps(config))
    assert main(["check", str(folder)]) == 2
    path.write_text(json.dumps({**config, "attn_implementation": "eager"}))
    assert main(["check", str(folder), "--trust-remote-code"]) == 0


def test_the_template_of_a_gguf_file_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe of CVE-2024-34359, which ran code where a chat template was filled in."""
    mark = tmp_path / "RAN"
    write_gguf(tmp_path, f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}")
    assert main(["check", str(tmp_path / "model.gguf")]) == 0
    assert "12 tensors were dequantised again from the file by the gguf package" in capsys.readouterr().out
    assert not mark.exists()


@pytest.mark.parametrize("layers", [4 * 10**9, [2 * 10**9], [-1, 20_000]])
@pytest.mark.parametrize(
    ("kind", "options"), [("llama", []), ("llama", ["--class", "LlamaForCausalLM"]), ("qwen2", [])]
)
def test_a_gguf_file_that_asks_for_layers_without_end(
    kind: str, options: list[str], layers: int | list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The config of the second kind makes a list of all its layers: 32 GB, before a model is made."""
    write_gguf(tmp_path, kind=kind, block_count=layers)
    assert main(["check", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert error == f"tiedquiet: {tmp_path}/model.gguf asks for more than 10,000 layers ({kind}.block_count)\n"


def write_gguf(folder: Path, template: str = "", kind: str = "llama", **changes: int | list[int]) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(folder / "model.gguf", kind)
    writer.add_chat_template(template)
    sizes = {"context_length": 16, "embedding_length": 8, "block_count": 1, "feed_forward_length": 16, "head_count": 2}
    for name, size in {**sizes, "head_count_kv": 2, "vocab_size": 32, "rope_dimension_count": 4, **changes}.items():
        writer.add_array(f"{kind}.{name}", size) if isinstance(size, list) else getattr(writer, f"add_{name}")(size)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {"token_embd": (32, 8), "output": (32, 8), "output_norm": (8,)}
    shapes |= {f"blk.0.attn_{name}": (8, 8) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (16, 8), "blk.0.ffn_up": (16, 8), "blk.0.ffn_down": (8, 16)}
    shapes |= {"blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

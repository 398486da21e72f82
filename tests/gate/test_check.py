"""`python -m tiedquiet check`: folders and names, good and bad, and what is said of them."""

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel, GPT2LMHeadModel

from tests import idioms
from tests.checkpoints import gpt2, save
from tests.compat import cases
from tests.doors.test_from_pretrained import wan_pipeline
from tests.doors.test_wrapping import run
from tests.gate.test_compare import bert, mixtral
from tiedquiet.__main__ import main
from tiedquiet.gate.diagnosis import damage, explain


@pytest.fixture
def good(tmp_path: Path) -> Path:
    save(GPT2LMHeadModel(gpt2()), tmp_path / "good")
    return tmp_path / "good"


def check(path: Path | str, *options: str) -> int:
    return main(["check", str(path), *options])


def config_of(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_a_checkpoint_that_is_well(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(good) == 0
    first, row = capsys.readouterr().out.splitlines()
    # Up to some release GPT-2 has its mask in a buffer.
    assert (
        first.removesuffix("; 1 buffer, written") == "GPT2LMHeadModel: 16 of 16 tensors hold the file's bytes; 1 tied"
    )
    assert row == "  lm_head.weight  tied  transformer.wte.weight"


@pytest.mark.parametrize("bars", [True, False])
def test_what_was_silenced_for_it_is_as_before(good: Path, bars: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers.logging, "_tqdm_active", bars)
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub", "tiedquiet")]
    levels = [logger.level for logger in loggers]
    assert check(good) == 0
    assert transformers.logging.is_progress_bar_enabled() is bars
    assert [logger.level for logger in loggers] == levels


@pytest.mark.parametrize("name", ["gpt2_flag_off", "gpt2_with_neither_end", "gpt2_with_an_unrelated_key_missing"])
def test_a_checkpoint_that_is_loud(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases.CASES[name](tmp_path)
    assert check(tmp_path, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    (component,) = report["components"]
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0] or report["versions"]["torch"]
    assert component["loud"] is True
    assert component["class"] == "GPT2LMHeadModel"
    assert component["held"] == component["tensors"] > 0
    assert component["files"] == [str(tmp_path / "model.safetensors")]
    found = {finding["key"]: finding["verdict"] for finding in component["findings"]}
    if found.get("transformer.ln_f.bias") == "unwritten":  # as transformers 5.2.0 leaves it
        component["missing"].append("transformer.ln_f.bias")
        found["transformer.ln_f.bias"] = "missing"
    expected = {
        "gpt2_flag_off": {"lm_head.weight": "untied"},
        "gpt2_with_neither_end": {"lm_head.weight": "missing", "transformer.wte.weight": "missing"},
        "gpt2_with_an_unrelated_key_missing": {"lm_head.weight": "tied", "transformer.ln_f.bias": "missing"},
    }
    assert found == expected[name]
    assert component["missing"] == sorted(key for key, verdict in found.items() if verdict == "missing")
    assert check(tmp_path) == 1
    out = capsys.readouterr().out
    assert ("1 missing" if "missing" in expected[name].values() and "unrelated" in name else "GPT2LMHeadModel: ") in out


def test_a_model_without_ties_and_with_buffers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(BertModel(bert()), tmp_path)
    assert check(tmp_path) == 0
    assert capsys.readouterr().out == "BertModel: 23 of 23 tensors hold the file's bytes; 2 buffers, all written\n"


@pytest.mark.parametrize("form", ["shards", "bin", "bin before torch 1.6"])
def test_the_forms_that_a_checkpoint_can_have(form: str, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if form == "shards":
        GPT2LMHeadModel.from_pretrained(good).save_pretrained(good, max_shard_size="8KB")
        assert len(list(good.glob("*.safetensors"))) > 2
        (good / "model.safetensors").unlink()
    else:
        stored = load_file(good / "model.safetensors")
        (good / "model.safetensors").unlink()
        torch.save(stored, good / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    assert check(good) == 0
    assert "16 of 16 tensors" in capsys.readouterr().out


def test_a_file_that_has_a_tensor_with_its_prefix_and_without(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As after merging a base model's file into one with a head: transformers drops one of the two without a word."""
    path = good / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "wte.weight": tensors["transformer.wte.weight"].clone()}, path, {"format": "pt"})
    assert check(good) == 0
    save_file({**tensors, "wte.weight": tensors["transformer.wte.weight"] + 1}, path, {"format": "pt"})
    assert check(good) == 1
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [" ".join(row.split()) for row in rows] == [
        "lm_head.weight ambiguous transformer.wte.weight not of wte.weight: the file has both",
        "transformer.wte.weight ambiguous not of wte.weight: the file has both",
    ]


def test_the_type_and_the_device(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(good, "--dtype", "bfloat16", "--device", "cpu") == 0
    assert "16 of 16 tensors" in capsys.readouterr().out
    assert check(good, "--device", "nonsense") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert check(good, "--dtype", "int3") == 2
    assert "argument --dtype: invalid choice: 'int3'" in capsys.readouterr().err


def test_without_architectures_a_head_was_not_checked(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_of(good, architectures=None)
    assert check(good) == 1
    assert "loaded as GPT2Model, so a head, if there is one, was not checked" in capsys.readouterr().out
    assert check(good, "--class", "GPT2LMHeadModel") == 0
    assert check(good, "--class", "transformers.GPT2LMHeadModel") == 0
    assert "1 tied" in capsys.readouterr().out
    for name in ("NoSuchClass", "no.such.module.Class", "json.NoSuchClass"):
        assert check(good, "--class", name) == 2
        assert f"there is no class {name} to load it as" in capsys.readouterr().err
    assert check(good, "--class", "json.JSONDecoder") == 2
    assert "cannot be loaded as JSONDecoder" in capsys.readouterr().err
    assert check(good, "--class", "tests.gate.test_check.NotALoad") == 2
    assert "str was not loaded by `from_pretrained`" in capsys.readouterr().err


class NotALoad:
    @staticmethod
    def from_pretrained(*_: object, **__: object) -> tuple[Any, dict[str, Any]]:
        class str(torch.nn.Module):
            pass

        return str(), {}


def test_a_tensor_that_the_model_has_no_place_for_is_shown_and_not_loud(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = good / "model.safetensors"
    save_file({**load_file(path), "extra.weight": torch.ones(3)}, path, {"format": "pt"})
    assert check(good) == 0
    assert "extra.weight    unexpected" in capsys.readouterr().out


def test_what_the_class_allows_to_be_missing_is_counted(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = good / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "ln_f" not in k}, path, {"format": "pt"})
    assert check(good, "--class", "tests.gate.test_check.Lenient") == 0
    assert (
        "14 of 14 tensors hold the file's bytes; 1 tied; 2 not stored, which its class allows"
        in capsys.readouterr().out
    )


class Lenient(GPT2LMHeadModel):
    _keys_to_ignore_on_load_missing = ("ln_f",)


def test_fused_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixtral().save_pretrained(tmp_path)
    assert check(tmp_path) == 0
    assert "hold the file's bytes" in capsys.readouterr().out


def test_each_model_of_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = wan_pipeline(tmp_path)
    status = check(pipeline, "--json")
    report = json.loads(capsys.readouterr().out)
    scheduler, encoder, *others = report["components"]
    assert (scheduler["component"], scheduler["has_tensors"], scheduler["loud"]) == ("scheduler", False, False)
    assert (encoder["component"], encoder["class"]) == ("text_encoder", "UMT5EncoderModel")
    (found,) = encoder["findings"]
    assert found["key"] == "encoder.embed_tokens.weight"
    assert status == (0 if found["verdict"] == "tied" else 1)
    assert [component["class"] for component in others] == ["WanTransformer3DModel", "AutoencoderKLWan"]
    for component in others:
        (file,) = component["files"]
        assert component["held"] == component["tensors"] == len(load_file(file))
    assert check(pipeline) == status
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "scheduler: FlowMatchEulerDiscreteScheduler: has no tensors"
    assert out[1].startswith("text_encoder: UMT5EncoderModel: ")
    held = sum(component["held"] for component in report["components"])
    assert out[-1] == f"{4 - status} of 4 components are well; {held} of {held} tensors hold the files' bytes"
    assert check(pipeline, "--class", "UMT5EncoderModel") == 2
    assert "is a pipeline of several models" in capsys.readouterr().err


# What cannot be loaded


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path.parent


def cut(folder: Path, size: int) -> Path:
    path = folder / "model.safetensors"
    return write(path, path.read_bytes()[:size])


def as_bin(folder: Path, extra: Any = None, keep: int | None = None) -> Path:
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({**stored, **(extra or {})}, path)
    return write(path, path.read_bytes()[:keep])


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("it-was-run",)


def without_a_shard(folder: Path) -> Path:
    GPT2LMHeadModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="8KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("*.safetensors"))[1].unlink()
    return folder


def as_an_index(folder: Path, content: Any) -> Path:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    return write(folder / "model.safetensors.index.json", json.dumps(content))


def changed(folder: Path, **changes: Any) -> Path:
    config_of(folder, **changes)
    return folder


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda g: g.parent / "nowhere" / "at" / "all", "is not a folder, and no model on the hub can have this name"),
        (lambda g: "some/model", "is neither a folder nor in the local cache, and the hub cannot be reached: HF_HUB_OFFLINE is set"),
        (lambda g: g.parent, "has neither config.json nor model_index.json"),
        (lambda g: g / "model.safetensors", "is a file; give the folder that it is in"),
        (lambda g: write(g / "config.json", "{"), "cannot be read"),
        (lambda g: write(g / "config.json", "[]"), "holds no JSON object"),
        (lambda g: write(g / "model_index.json", "{}"), "is a pipeline, and its model_index.json names no component"),
        (lambda g: changed(g, architectures=["NoSuchModel"]), "config.json names NoSuchModel, which transformers"),
        (lambda g: changed(g, vocab_size=80), "transformer.wte.weight is 64 by 16 in the file and 80 by 16 in the model"),
        (lambda g: cut(g, 5000), "model.safetensors is truncated: its header promises"),
        (lambda g: cut(g, 100), "model.safetensors is truncated or not a safetensors file: it has 100 bytes"),
        (lambda g: cut(g, 0), "model.safetensors is truncated or not a safetensors file: it has 0 bytes"),
        (lambda g: write(g / "model.safetensors", b"\x04" + bytes(7) + b"abcd"), "is damaged: its header cannot be read"),
        (lambda g: write(g / "model.safetensors", "version https://git-lfs.github.com/spec/v1\noid"), "is a Git LFS pointer"),
        (without_a_shard, "names model-00002-of-0000"),
        (lambda g: write(g / "model.safetensors.index.json", "[]") and cut(g, 0), "model.safetensors.index.json is damaged"),
        (lambda g: as_an_index(g, {"metadata": {}, "weight_map": {}}), "model.safetensors.index.json is damaged: it names no files"),
        (lambda g: as_an_index(g, {"weight_map": {"transformer.wte.weight": "a.safetensors"}}), "index.json has no metadata, for which transformers asks"),
        (lambda g: as_bin(g, keep=3000), "pytorch_model.bin is truncated: the end of it is missing"),
        (lambda g: as_bin(g, keep=0), "pytorch_model.bin is empty"),
        (lambda g: as_bin(g, {"x": RunsCode()}), "pytorch_model.bin is a pickle that wants to run code when it is read"),
        (lambda g: write(g.parent / "gguf" / "m.gguf", b"GGUF" + bytes(50)), "m.gguf is a GGUF file, which cannot be loaded here: "),
        (lambda g: write(g.parent / "gguf" / "m.gguf", b"GGUF" + bytes(50)) / "m.gguf", "m.gguf is a GGUF file, which cannot be loaded here: "),
        (lambda g: write(g.parent / "two" / "a.gguf", b"") and write(g.parent / "two" / "b.gguf", b""), "holds 2 GGUF files; name one of them"),
        (lambda g: write(g.parent / "lora" / "adapter_config.json", '{"base_model_name_or_path": "no/base"}'), "lora is an adapter, and its base model is not available: no/base is neither"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_gets_one_line(
    make: Any, says: str, good: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(good.parent)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = make(good)
    capsys.readouterr()
    assert check(path) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert error.startswith("tiedquiet: ")
    assert "report" not in error
    assert not Path("it-was-run").exists()


def test_a_file_that_may_not_be_read(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert list(damage(good)) == [
        "generation_config.json cannot be read as a JSON object",
        "model.safetensors cannot be read: Permission denied",
    ]


def test_all_that_is_wrong_with_a_folder(good: Path) -> None:
    (good / "model.safetensors.index.json").write_text("[]")
    (good / "a.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": "model.safetensors"}}))
    (good / "b.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": "one.bin", "y": "two.bin"}}))
    cut(good, 0)
    assert [line.partition(":")[0] for line in damage(good)] == [
        "b.bin.index.json names one.bin, two.bin, which are not there",
        "model.safetensors.index.json is damaged",
        "model.safetensors is truncated or not a safetensors file",
    ]


def test_an_error_that_only_looks_like_one_of_transformers_4_is_told_as_it_is() -> None:
    assert explain(AttributeError("'list' object has no attribute 'keys'"), None, False) == "AttributeError: 'list' object has no attribute 'keys'"  # fmt: skip
    assert explain(TypeError("X.tie_weights() got an unexpected keyword argument 'y'"), None, False).startswith("X.tie_weights takes no")  # fmt: skip
    assert explain(AttributeError("'X' object has no attribute 'all_tied_weights_keys'"), None, False).startswith("X.__init__ does")  # fmt: skip
    assert explain(KeyError(), None, False) == "KeyError"


def test_a_class_that_has_no_file(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("nowhere")
    module.__file__ = __file__  # 5.0.0 opens it, and it does not have the class
    monkeypatch.setitem(sys.modules, "nowhere", module)
    names: dict[str, Any] = {"__name__": "nowhere"}
    exec(
        "class NoFile(Base):\n    _tied_weights_keys = ['lm_head.weight']\n", {**names, "Base": GPT2LMHeadModel}, names
    )
    with pytest.raises(AttributeError) as raised:
        names["NoFile"](gpt2())
    assert explain(raised.value, None, False).startswith("NoFile._tied_weights_keys is a list, but transformers 5")


# The hub


def cached(folder: Path, hub: Path, revision: str = "main", pipeline: bool = False) -> None:
    """Put a folder where huggingface_hub keeps what it has downloaded."""
    commit = f"{hash(revision) & 0xFFFFFFFF:040x}"
    repo = hub / "models--some--model"
    shutil.copytree(folder, repo / "snapshots" / commit)
    write(repo / "refs" / revision, commit)


@pytest.mark.slow
def test_a_model_of_the_local_cache(good: Path, tmp_path: Path) -> None:
    cached(good, tmp_path / "hub")
    config_of(good, tie_word_embeddings=False)
    cached(good, tmp_path / "hub", "bad")
    script = "import sys; from tiedquiet.__main__ import main; sys.exit(main(['check', 'some/model', *{options!r}]))"
    where = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = run(script.format(options=[]), **where)
    assert (done.returncode, done.stdout.splitlines()[0]) == (
        0,
        "GPT2LMHeadModel: 16 of 16 tensors hold the file's bytes; 1 tied",
    )
    done = run(script.format(options=["--revision", "bad"]).replace("sys.exit(", "print("), **where)
    assert "lm_head.weight  untied  transformer.wte.weight" in done.stdout
    assert done.stdout.endswith("\n1\n")


@pytest.mark.slow
def test_a_pipeline_of_the_local_cache(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder = wan_pipeline(tmp_path / "wan")
    config_of(folder / "text_encoder", tie_word_embeddings=True)
    model = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    model.save_pretrained(folder / "transformer", max_shard_size="4KB")
    cached(folder, tmp_path / "hub")
    torch.save(load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"), folder / "vae" / "diffusion_pytorch_model.bin")  # fmt: skip
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    cached(folder, tmp_path / "hub", "pickle")
    where = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    script = "import torch; torch.__version__ = type(torch.__version__)({torch!r}); from tiedquiet.__main__ import main; print(main(['check', 'some/model', '--revision', {revision!r}, *{options!r}]))"
    done = run(script.format(torch="2.9.0", revision="main", options=[]), **where)
    assert done.stdout.endswith(" tensors hold the files' bytes\n0\n"), done
    assert f"transformer: WanTransformer3DModel: {len(model.state_dict())} of {len(model.state_dict())} " in done.stdout
    done = run(script.format(torch="2.9.0", revision="pickle", options=[]), **where)
    assert "vae: AutoencoderKLWan: cannot be checked: has no safetensors file, and torch 2.9.0 does not" in done.stdout
    assert done.stdout.endswith("\n1\n")
    done = run(script.format(torch="2.9.0", revision="pickle", options=["--trust-pickle"]), **where)
    assert done.stdout.endswith("\n0\n")


@pytest.mark.slow
def test_a_pickle_on_the_hub_and_a_file_that_is_cut(good: Path, tmp_path: Path) -> None:
    cached(as_bin(good), tmp_path / "hub")
    as_bin_again = GPT2LMHeadModel.from_pretrained(good)
    as_bin_again.save_pretrained(good)
    cached(cut(good, 5000), tmp_path / "hub", "cut")
    script = "import torch; torch.__version__ = type(torch.__version__)({torch!r}); from tiedquiet.__main__ import main; print(main(['check', 'some/model', '--revision', {revision!r}]))"
    where = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    assert run(script.format(torch=torch.__version__, revision="main"), **where).stdout.endswith("\n0\n")
    done = run(script.format(torch="2.9.0", revision="main"), **where)
    assert (done.stdout, done.stderr.count("\n")) == ("2\n", 1)
    assert "it has no safetensors file, and torch 2.9.0 does not read pickles safely" in done.stderr
    done = run(script.format(torch=torch.__version__, revision="cut"), **where)
    assert "model.safetensors is truncated: its header promises" in done.stderr


class Hub(BaseHTTPRequestHandler):
    """A hub that has the repository `some/empty`, with nothing in it."""

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound" if "/some/empty/" in self.path else "RepoNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("some/gone", "some/gone is not a folder, and it cannot be downloaded: "),
        ("some/empty", "some/empty has neither config.json nor model_index.json\n"),
        (
            "no/connection",
            "no/connection is neither a folder nor in the local cache, and the hub cannot be reached: there",
        ),
    ],
)
def test_what_the_hub_does_not_give(name: str, says: str, hub: str, tmp_path: Path) -> None:
    script = f"from tiedquiet.__main__ import main; print(main(['check', {name!r}]))"
    endpoint = "http://127.0.0.1:9" if name == "no/connection" else hub
    done = run(
        script, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0", HF_HUB_CACHE=str(tmp_path), HF_HUB_DISABLE_TELEMETRY="1"
    )
    assert done.stdout == "2\n"
    assert done.stderr.startswith(f"tiedquiet: {says}")
    assert done.stderr.count("\n") == 1


def test_an_adapter_over_a_model_that_is_converted_while_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter's conversions take the place of the model's own."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, vocab_size=64, num_key_value_heads=2, num_local_experts=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapter = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    assert check(tmp_path / "adapter") == 0
    assert "unproven" not in capsys.readouterr().out


def test_an_adapter(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        GPT2LMHeadModel.from_pretrained(good),
        LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False),
    )
    model.peft_config["default"].base_model_name_or_path = str(good)
    model.save_pretrained(tmp_path / "lora")
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "lora").state_dict()
    # transformers 5.0.0 and 5.2.0 make the adapter anew and read nothing into it.
    held = all(any(torch.equal(value, other) for other in loaded.values()) for value in stored.values())
    status = check(tmp_path / "lora")
    if status == 2:  # transformers 5.2.0 fails when it is asked what it loaded of an adapter
        assert not held
        return
    assert status == (0 if held else 1)
    out = capsys.readouterr().out
    assert f"GPT2LMHeadModel: {18 if held else 16} of {18 if held else 16} tensors hold the file's bytes; 1 tied" in out
    assert ("2 missing" in out) != held


# Code that comes with a checkpoint, some of it written for transformers 4

MODELLING = """
import torch
from transformers import PreTrainedModel, PretrainedConfig


class MyConfig(PretrainedConfig):
    model_type = "mymodel"

    def __init__(self, tie_word_embeddings=True, **kwargs):
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.tie_word_embeddings = tie_word_embeddings


class MyForCausalLM(PreTrainedModel):
    config_class = MyConfig
    _tied_weights_keys = {"head.weight": "embed.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(8, 4)
        self.head = torch.nn.Linear(4, 8, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def _init_weights(self, module):
        pass
"""


def remote(folder: Path, old: str = "", new: str = "") -> Path:
    assert old in MODELLING
    write(folder / "modeling_my.py", MODELLING.replace(old, new) if old else MODELLING)
    auto = {"AutoConfig": "modeling_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyForCausalLM"}
    config = {
        "model_type": "mymodel",
        "architectures": ["MyForCausalLM"],
        "auto_map": auto,
        "tie_word_embeddings": True,
    }
    write(folder / "config.json", json.dumps(config))
    save_file({"embed.weight": torch.randn(8, 4)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_code_of_the_checkpoint_runs_only_if_it_is_let(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remote(tmp_path / "remote")
    assert check(tmp_path / "remote") == 2
    assert (
        "its class MyForCausalLM is code that ships with it (modeling_my.py); --trust-remote-code allows"
        in capsys.readouterr().err
    )
    assert check(tmp_path / "remote", "--trust-remote-code") == 0
    assert "MyForCausalLM: 1 of 1 tensor holds the file's bytes; 1 tied" in capsys.readouterr().out
    config_of(tmp_path / "remote", architectures=None)
    assert check(tmp_path / "remote") == 2
    assert (
        "its class is code that ships with the checkpoint; --trust-remote-code allows it to run"
        in capsys.readouterr().err
    )


def test_what_code_of_the_checkpoint_prints_is_not_in_what_a_machine_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = remote(
        tmp_path / "remote",
        "        super().__init__(config)\n",
        "        super().__init__(config)\n        print('no flash')\n",
    )
    assert check(folder, "--trust-remote-code", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["components"]
    assert "no flash" in err


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('{"head.weight": "embed.weight"}', '["head.weight"]', 'modeling_my.py:16) is a list, but transformers 5 needs to know what each key is tied to; write _tied_weights_keys = {"head.weight": "embed.weight"}'),
        ("        self.post_init()\n", "", "modeling_my.py:18) does not call self.post_init(), which transformers 5 needs"),
        ("    def _init_weights", "    def tie_weights(self):\n        self.head.weight = self.embed.weight\n\n    def _init_weights", "modeling_my.py:30) takes no arguments, but transformers 5 passes some; write def tie_weights(self, *args, **kwargs)"),
        ('_tied_weights_keys = {"head.weight": "embed.weight"}', '_tied_weights_keys = ["head.weight"]\n    get_input = None', "modeling_my.py:16) is a list"),
        ("    def get_input_embeddings(self):\n        return self.embed", "    def get_input_embeddings(self):\n        raise NotImplementedError", None),
    ],
)  # fmt: skip
def test_a_modelling_file_of_transformers_4_is_told_what_to_change(
    old: str, new: str, says: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = remote(tmp_path / "remote", old, new)
    if says is None:  # the source cannot be told
        text = (folder / "modeling_my.py").read_text().replace('{"head.weight": "embed.weight"}', '["head.weight"]')
        (folder / "modeling_my.py").write_text(text)
        says = 'write _tied_weights_keys = {"head.weight": "NAME_OF_THE_INPUT_EMBEDDING.weight"}'
    assert check(folder, "--trust-remote-code") == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


class TurnsASquare(idioms.Tiny):
    """Its own code turns what was read, and no value is lost."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        super().tie_weights(*args, **kwargs)
        if not self.lin.weight.is_meta:
            self.lin.weight = torch.nn.Parameter(self.lin.weight.detach().t().contiguous())


def test_what_the_class_turns_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    idioms.Idiom(TurnsASquare).save(tmp_path)
    assert check(tmp_path, "--class", f"{__name__}.TurnsASquare") == 0
    assert "5 of 5 tensors hold the file's bytes" in capsys.readouterr().out

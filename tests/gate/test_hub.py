"""Names on the hub: what the local cache has, and what the hub does not give."""

import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from tests.doors.test_from_pretrained import wan_pipeline
from tests.doors.test_wrapping import run
from tests.gate.test_broken import as_bin, cut, write
from tests.gate.test_check import config_of


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
            "no/connection is no folder, the local cache has no config.json of it, and the hub cannot be reached: there",
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

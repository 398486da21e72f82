"""Parts of a pipeline that have no tensors, and those that its index does not name: what diffusers says is the truth."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.gate.test_check import check
from tests.gate.test_pipeline import components
from tiedquiet.gate import classes

diffusers = pytest.importorskip("diffusers")
WORDS = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>", "ab</w>"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline as diffusers saves it: without a safety checker, and with vocabulary files as older releases had them."""
    folder = tmp_path_factory.mktemp("made") / "sd"
    words = folder / "tokenizer"
    words.mkdir(parents=True)
    (words / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(WORDS)}))
    (words / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    block = {"block_out_channels": (8,), "norm_num_groups": 2, "layers_per_block": 1}
    diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(latent_channels=4, **block),
        text_encoder=CLIPTextModel(CLIPTextConfig(**size, vocab_size=64, max_position_embeddings=16)),
        tokenizer=CLIPTokenizer.from_pretrained(words),
        unet=diffusers.UNet2DConditionModel(
            **block, cross_attention_dim=16, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
        ),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(),
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "pipe")


def name(folder: Path, **parts: Any) -> None:
    """Give an index other parts; ... for none."""
    index = {**json.loads((folder / "model_index.json").read_text()), **parts}
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if v is not ...}))


def load(folder: Path, **passed: Any) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(folder, **passed)


def lines(folder: Path, status: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert check(folder) == status
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


@pytest.mark.parametrize("extractor", ["CLIPImageProcessor", "CLIPFeatureExtractor"])  # its name in transformers 4
def test_a_pipeline_that_is_well(extractor: str, pipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name(pipe, feature_extractor=["transformers", extractor])
    load(pipe)
    said = lines(pipe, 0, capsys)
    assert f"feature_extractor: {extractor}: has no tensors" in said
    assert "tokenizer: CLIPTokenizer: has no tensors" in said or "tokenizer: CLIPTokenizerFast: has no tensors" in said
    assert said[-1].startswith("6 of 6 components are sound; ")


@pytest.mark.parametrize(
    ("part", "file", "content"),
    [
        ("scheduler", "scheduler_config.json", None),
        ("scheduler", "scheduler_config.json", "{"),
        ("feature_extractor", "preprocessor_config.json", None),
        ("tokenizer", "tokenizer.json", "{"),
        ("tokenizer", "tokenizer_config.json", "{"),
        ("tokenizer", "vocab.json", "{"),
    ],
)
def test_a_part_that_cannot_be_made_of_its_folder(
    part: str, file: str, content: str | None, pipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if file == "vocab.json":
        (pipe / part / "tokenizer.json").unlink()
        (pipe / part / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    if content is None:
        shutil.rmtree(pipe / part)
        (pipe / part).mkdir()
    else:
        (pipe / part / file).write_text(content)
    with pytest.raises(Exception, match=r"."):
        load(pipe)
    assert check(pipe, "--json") == 1
    found = components(capsys)
    assert {key for key, component in found.items() if component["loud"]} == {part}
    assert file in found[part]["error"]


def test_a_tokenizer_without_words(pipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Diffusers makes one that knows no word, and says nothing."""
    (pipe / "tokenizer" / "tokenizer.json").unlink()
    (pipe / "tokenizer" / "vocab.json").unlink(missing_ok=True)
    (pipe / "tokenizer" / "merges.txt").unlink(missing_ok=True)
    assert len(load(pipe).tokenizer) < len(WORDS)
    said = lines(pipe, 1, capsys)
    assert any("cannot be checked: it has none of tokenizer.json, vocab.json, merges.txt, " in line for line in said)
    ByT5Tokenizer().save_pretrained(pipe / "tokenizer")  # it needs no file
    name(pipe, tokenizer=["transformers", "ByT5Tokenizer"])
    assert "tokenizer: ByT5Tokenizer: has no tensors" in lines(pipe, 0, capsys)


@pytest.mark.parametrize(
    "entry",
    [
        ["transformers", "AutoModel"],
        ["diffusers", "AutoModel"],
        ["transformers", "Trainer"],
        ["transformers", "CLIPConfig"],
        ["transformers", "__class__"],
        ["diffusers", "DDIMPipeline"],
    ],
)
def test_a_part_that_is_nothing_of_the_kind(entry: list[str], pipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(pipe / "unet", pipe / "other")
    name(pipe, unet=..., other=entry, _class_name="Mine")
    said = [line for line in lines(pipe, 1, capsys) if line.startswith("other: ")]
    assert [line.rpartition(" is neither ")[2] for line in said] == [
        "a model that can be compared nor a scheduler, a tokenizer or a processor"
    ]


def test_a_class_whose_package_is_not_installed(
    pipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Absent:
        _backends = ("scipy",)

    monkeypatch.setattr(diffusers, "DDIMScheduler", Absent)
    assert "scheduler: DDIMScheduler: has no tensors" in lines(pipe, 0, capsys)
    (pipe / "scheduler" / "model.onnx").write_bytes(b"values")
    says = "it has model.onnx, and DDIMScheduler needs scipy, which cannot be imported here"
    assert f"scheduler: DDIMScheduler: cannot be checked: {says}" in lines(pipe, 1, capsys)


# What the index does not name


@pytest.mark.parametrize("given", [..., ["diffusers", "DDIMScheduler", "x"], "diffusers", [], None, 7])
def test_a_part_that_the_class_needs(given: Any, pipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name(pipe, scheduler=given)
    with pytest.raises((ValueError, TypeError, IndexError)):
        load(pipe)
    (said,) = (line for line in lines(pipe, 1, capsys) if line.startswith("scheduler: "))
    assert said.startswith("scheduler: StableDiffusionPipeline: cannot be checked: ")
    assert ("does not name it" if given is ... else f"model_index.json gives {given!r} for it") in said


def test_a_part_that_is_switched_off_is_named(pipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is what diffusers writes for one that was not there."""
    name(pipe, tokenizer=[None, None])
    with pytest.raises(ValueError, match="expected"):
        load(pipe)
    load(pipe, tokenizer=None)
    said = lines(pipe, 0, capsys)
    assert "tokenizer: StableDiffusionPipeline: switched off: from_pretrained has to be given one, or None" in said
    assert said[-1].startswith("5 of 5 components are sound; ")


@pytest.mark.parametrize(
    ("folder", "given", "says"),
    [
        (
            "image_encoder",
            ...,
            "cannot be checked: it has weights, and model_index.json does not name it: nothing reads",
        ),
        ("image_encoder", [None, None], ""),
        ("old_unet", ..., "model_index.json does not name it, so nothing reads its weights"),
        (".cache", ..., "model_index.json does not name it, so nothing reads its weights"),
    ],
)
def test_a_folder_with_weights_that_the_index_does_not_name(
    folder: str, given: Any, says: str, pipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Diffusers makes the pipeline without it, and says nothing."""
    shutil.copytree(pipe / "text_encoder", pipe / folder)
    (pipe / "elsewhere").symlink_to(pipe / "unet")
    name(pipe, **{folder: given})
    assert getattr(load(pipe), folder, None) is None
    said = [line for line in lines(pipe, int("weights, and" in says), capsys) if line.startswith(f"{folder}: ")]
    assert [line.partition("Pipeline: ")[2][: len(says)] for line in said] == [says] * bool(says)


def test_a_part_that_the_class_needs_is_told_once(pipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name(pipe, unet=...)
    (said,) = (line for line in lines(pipe, 1, capsys) if line.startswith("unet: "))
    assert said.endswith("cannot be checked: it cannot be made without one, and model_index.json does not name it")


@pytest.mark.parametrize("kind", ["transformers", "diffusers"])
def test_a_model_beside_the_index(kind: str, pipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`from_pretrained` of a model reads it from the same folder, whatever an index says."""
    part = pipe / ("text_encoder" if kind == "transformers" else "vae")
    for path in part.iterdir():
        shutil.copy(path, pipe)
    assert check(pipe, "--json") == 0
    found = components(capsys)
    assert found["."]["held"] == found[part.name]["held"] > 0
    weights = next(pipe.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert check(pipe, "--json") == 1
    found = components(capsys)
    assert {key for key, component in found.items() if component["loud"]} == {"."}
    assert "is truncated" in found["."]["error"]


def test_of_a_class_that_is_not_known_it_is_seen_by_the_library(pipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = ["diffusers", "DDIMScheduler", "x"]
    name(pipe, _class_name="Mine", scheduler=entry, sizes=["a", "b", "c"], _hidden=entry)
    (said,) = (line for line in lines(pipe, 1, capsys) if "model_index.json gives" in line)
    assert said.startswith("scheduler: Mine: cannot be checked: ")


def every_class() -> Iterator[Any]:
    for key in dir(diffusers):
        if key.endswith("Pipeline") and classes.parts_of(key) is not None:
            yield getattr(diffusers, key)


def test_every_class_of_diffusers_has_its_parts() -> None:
    """As its own `from_pretrained` counts them; a pipeline that is made of two has the rest from the other."""
    found = list(every_class())
    assert len(found) > 100
    assert classes.parts_of("DiffusionPipeline") is classes.parts_of("UNet2DModel") is classes.parts_of(None) is None
    for kind in found:
        parts = classes.parts_of(kind.__name__)
        expected, _ = diffusers.DiffusionPipeline._get_signature_keys(kind)
        needed = {part for part, is_needed in parts.items() if is_needed} if parts else set()
        assert needed == (set() if kind._load_connected_pipes else set(expected) - set(kind._optional_components))


def test_without_diffusers_a_name_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    assert classes.today("CLIPFeatureExtractor") == "CLIPImageProcessor"
    assert classes.today({}) == {}
    monkeypatch.setitem(sys.modules, "diffusers.utils", None)
    assert classes.today("CLIPFeatureExtractor") == "CLIPFeatureExtractor"

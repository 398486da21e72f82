"""`--lora FILE`: how much of a LoRA file reaches a pipeline, by diffusers' own loading, in every form that it converts."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.doors.test_from_pretrained import wan_pipeline
from tests.gate.test_check import check
from tiedquiet.gate import lora
from tiedquiet.gate.load import How

diffusers = pytest.importorskip("diffusers")
LoraConfig = pytest.importorskip("peft").LoraConfig
from tiedquiet.distill import lora as ours  # noqa: E402 (it needs both)

RANK, LAYERS = 4, 10
Tensors = dict[str, torch.Tensor]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = wan_pipeline(tmp_path_factory.mktemp("wan"))
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return folder


@pytest.fixture(scope="module")
def by_peft(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """What the bundled example trains, under peft's names."""
    place = tmp_path_factory.mktemp("lora") / "saved"
    adapter = ours.Adapter(diffusers.WanTransformer3DModel.from_pretrained(wan / "transformer"), "student").add(RANK, 1)
    for parameter in adapter.parameters():
        parameter.data = torch.randn_like(parameter)
    adapter.save(place)
    return load_file(place / ours.FILE)


@pytest.fixture(scope="module")
def published(wan: Path, by_peft: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as the example writes it: under the names of Wan's authors, for ComfyUI."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "saved").mkdir()
    save_file(by_peft, folder / "saved" / ours.FILE)
    ours.write_lora({"transformer": folder / "saved"}, folder, torch.float32)
    return folder / ours.FILE


@pytest.fixture
def outcome(wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What is said of tensors written to a file."""

    def say(tensors: Tensors, status: int, folder: Path = wan, metadata: Any = None) -> dict[str, Any]:
        save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "some.safetensors", metadata)
        capsys.readouterr()
        assert check(folder, "--lora", str(tmp_path / "some.safetensors"), "--json") == status
        found = json.loads(capsys.readouterr().out)["components"][-1]
        assert found["component"] == "some.safetensors"
        return found

    return say


def with_alpha(tensors: Tensors, alpha: float) -> Tensors:
    """As tools of kohya's kind write it: other names of the two, and a tensor that says how they are scaled."""
    renamed = {k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for k, t in tensors.items()}
    return renamed | {f"{k.partition('.lora_')[0]}.alpha": torch.tensor(alpha) for k in tensors}


def in_musubi_s(tensors: Tensors) -> Tensors:
    """Underscores instead of dots in the names of layers."""
    found = {}
    for key, tensor in tensors.items():
        layer, dot, rest = key.removeprefix("diffusion_model.").partition(".lora_")
        layer, dot, rest = (layer, dot, rest) if dot else (layer.removesuffix(".alpha"), ".", "alpha")
        found[f"lora_unet_{layer.replace('.', '_')}{dot}{rest}"] = tensor
    return found


def test_what_the_example_writes(wan: Path, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(wan, "--lora", str(published)) == 0
    *_, line, last = capsys.readouterr().out.splitlines()
    assert line == f"{ours.FILE}: WanPipeline: 20 of 20 tensors of the file reach transformer"
    assert last.startswith("4 of 4 components are sound; 144 of 144 tensors")


@pytest.mark.parametrize("alpha", [3.0, 4.0])
@pytest.mark.parametrize("form", ["comfy", "musubi", "bfloat16"])
def test_forms_that_diffusers_converts(
    form: str, alpha: float, published: Path, outcome: Callable[..., dict[str, Any]]
) -> None:
    tensors = with_alpha(load_file(published), alpha)
    if form == "musubi":
        tensors = in_musubi_s(tensors)
    elif form == "bfloat16":
        tensors = {key: tensor.bfloat16() for key, tensor in tensors.items()}
    found = outcome(tensors, 0)
    assert (found["held"], found["tensors"], found["counted"]) == (
        3 * LAYERS,
        3 * LAYERS,
        "tensors of the file reach transformer",
    )
    assert found["notes"] == ["layers scaled by the file's alpha: 10"]


def test_peft_s_names_and_what_is_written_beside_them(
    wan: Path, by_peft: Tensors, outcome: Callable[..., dict[str, Any]]
) -> None:
    tensors = {f"transformer.{key}": tensor for key, tensor in by_peft.items()}
    assert outcome(tensors, 0)["held"] == 20
    # All of it, as diffusers' own training programs write it: megatron's module is named, and not asked for.
    whole = LoraConfig(r=RANK, lora_alpha=8, target_modules=ours.TARGETS).to_dict()
    config = {f"transformer.{key}": list(value) if isinstance(value, set) else value for key, value in whole.items()}
    assert config["transformer.megatron_core"]
    assert outcome(tensors, 0, metadata={"lora_adapter_metadata": json.dumps(config)})["held"] == 20
    config["transformer.r"] = 2 * RANK
    found = outcome(tensors, 1, metadata={"lora_adapter_metadata": json.dumps(config)})
    assert "size mismatch" in found["error"]
    found = outcome(
        by_peft, 1, wan / "transformer", {"lora_adapter_metadata": json.dumps({"r": 8, "target_modules": []})}
    )
    assert "size mismatch" in found["error"]


def test_adapters_that_are_still_zero(published: Path, outcome: Callable[..., dict[str, Any]]) -> None:
    """Their values tell nothing; where they came from does."""
    tensors = {key: torch.zeros_like(tensor) for key, tensor in load_file(published).items()}
    assert outcome(tensors, 0)["held"] == 20


def test_names_that_match_nothing(by_peft: Tensors, outcome: Callable[..., dict[str, Any]]) -> None:
    """Diffusers warns that this is safe to ignore."""
    found = outcome(by_peft, 1)
    assert (found["held"], found["tensors"], found["unexpected"]) == (0, 20, sorted(by_peft))
    first = ", ".join(sorted(by_peft)[:3])
    assert found["problem"] == f"20 of 20 match nothing: {first}, ..."
    tensors = {f"transformer.{key}": tensor for key, tensor in by_peft.items()}
    found = outcome({**tensors, "text_encoder.q_proj.lora_A.weight": torch.ones(4, 4)}, 1)
    assert (found["held"], found["problem"]) == (20, "1 of 21 match nothing: text_encoder.q_proj.lora_A.weight")


def test_the_name_of_an_adapter_in_the_names(by_peft: Tensors, outcome: Callable[..., dict[str, Any]]) -> None:
    """Diffusers makes the layers, and nothing is read into them: their memory is whatever it was."""
    tensors = {f"transformer.{key.replace('.weight', '.default.weight')}": t for key, t in by_peft.items()}
    found = outcome(tensors, 1)
    assert (found["held"], sorted(found["missing"])) == (0, sorted(f"transformer.{key}" for key in by_peft))
    assert {finding["verdict"] for finding in found["findings"]} == {"missing"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda key, t: (key.replace("model.", "model.module."), t), "since diffusers refuses the file: "),
        (lambda key, t: (key, torch.cat([t, t], 1) if "lora_A" in key else t), "size mismatch for blocks.0."),
        (lambda key, t: (key.replace("lora", "x"), t), "since diffusers refuses the file: "),
    ],
)
def test_what_diffusers_refuses(
    change: Any, says: str, published: Path, outcome: Callable[..., dict[str, Any]]
) -> None:
    found = outcome(dict(change(key, tensor) for key, tensor in load_file(published).items()), 1)
    assert found["error"].startswith("none of its 20 tensors is loaded, since diffusers refuses the file: ")
    assert says in found["error"]
    assert "\n" not in found["error"]


def test_a_file_of_nothing(outcome: Callable[..., dict[str, Any]]) -> None:
    assert outcome({}, 1)["problem"] == "it has no tensors"


def test_layers_that_diffusers_adds(wan: Path, by_peft: Tensors, tmp_path: Path) -> None:
    """To an adapter of a model without images, for one that has them: zeros, which are in no file."""
    folder = tmp_path / "transformer"
    config = {
        **diffusers.WanTransformer3DModel.load_config(wan / "transformer"),
        "image_dim": 8,
        "added_kv_proj_dim": 24,
    }
    diffusers.WanTransformer3DModel.from_config(config).save_pretrained(folder)
    (tmp_path / "model_index.json").write_text((wan / "model_index.json").read_text())
    tensors = {f"transformer.{key}": tensor for key, tensor in by_peft.items()}
    source = lora.Source(str(tmp_path), None)
    result = lora.check_pipeline(source, lora.File(Path("x"), tensors, None), How())
    assert (result.held, result.total, result.is_loud) == (20, 20, False)


def test_one_model_of_diffusers(
    wan: Path, published: Path, by_peft: Tensors, outcome: Callable[..., dict[str, Any]]
) -> None:
    one = wan / "transformer"
    assert outcome(by_peft, 0, one)["held"] == 20
    assert outcome({f"transformer.{key}": tensor for key, tensor in by_peft.items()}, 0, one)["held"] == 20
    found = outcome(load_file(published), 1, one)
    assert found["notes"] == [
        "only a pipeline's class converts other tools' names: for these, pass the pipeline's folder"
    ]
    assert outcome(by_peft, 1, wan / "vae")["error"] == "AutoencoderKLWan loads no LoRA files"


def stable_diffusion(folder: Path) -> tuple[Any, Any]:
    """A tiny pipeline of which two components take LoRA files."""
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, cross_attention_dim=16, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    encoder = CLIPTextModel(CLIPTextConfig(**size, vocab_size=64, max_position_embeddings=16))
    unet.save_pretrained(folder / "unet")
    encoder.save_pretrained(folder / "text_encoder")
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
    off = {key: [None, None] for key in ("scheduler", "tokenizer", "vae")}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **parts, **off}))
    return unet, encoder


def in_kohya_s(prefix: str, model: Any, ends: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, layer in model.named_modules():
        if name.endswith(ends):
            yield f"{prefix}_{name.replace('.', '_')}.lora_down.weight", torch.randn(RANK, layer.in_features)
            yield f"{prefix}_{name.replace('.', '_')}.lora_up.weight", torch.randn(layer.out_features, RANK)
            yield f"{prefix}_{name.replace('.', '_')}.alpha", torch.tensor(2.0)


def test_two_components_and_kohya_s_names(
    tmp_path: Path, outcome: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    unet, encoder = stable_diffusion(tmp_path / "sd")
    ends = ("q_proj", "k_proj", "v_proj", "out_proj")
    tensors = dict(in_kohya_s("lora_unet", unet, ("to_q", "to_k")))
    tensors |= in_kohya_s("lora_te_text_model", encoder, ends)
    found = outcome(tensors, 0, tmp_path / "sd")
    assert (found["held"], found["counted"]) == (len(tensors), "tensors of the file reach text_encoder and unet")
    assert found["notes"] == [f"layers scaled by the file's alpha: {len(tensors) // 3}"]


@pytest.mark.parametrize(
    ("name", "shown", "says"),
    [
        (["evil", "Model"], "['evil', 'Model']", "which is no pipeline of the installed diffusers"),
        ("DDPMPipeline", "DDPMPipeline", "which loads no LoRA files"),
    ],
)
def test_a_pipeline_that_loads_none(name: Any, shown: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    result = lora.check_pipeline(lora.Source(str(tmp_path), None), lora.File(Path("x"), {}, None), How())
    assert (result.error, result.is_loud) == (f"model_index.json names {shown}, {says}", True)


@pytest.mark.parametrize("part", ["transformer", ""])
def test_components_that_cannot_be_made(part: str, wan: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_layers": "one"}')
    (tmp_path / "model_index.json").write_text((wan / "model_index.json").read_text())
    source, file = lora.Source(str(tmp_path), None), lora.File(Path("x"), {}, None)
    if part:
        result = lora.check_pipeline(source, file, How())
    else:
        config = lora.Part(source, "nowhere", {}, None)
        result = lora.check_model(config, diffusers.WanTransformer3DModel, file, How())
    assert result.error.startswith("cannot be loaded: ")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.safetensors", b"junk", "x.safetensors cannot be read: Error while deserializing header"),
        ("x.safetensors", (3 << 30).to_bytes(8, "little"), "x.safetensors cannot be read: "),
        ("x.bin", b"junk", "x.bin is not a .safetensors file; --lora opens no other"),
        ("x.safetensors", None, "x.safetensors is not a regular file; --lora takes the LoRA file itself"),
    ],
)
def test_what_is_no_lora_file(
    name: str, content: bytes | None, says: str, wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for folder in (wan, wan / "transformer"):
        assert check(folder, "--lora", str(tmp_path / name)) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ("{", "cannot be read: Expecting property name"),
        ("[" * 100_000, "cannot be read: "),
        ("[]", "its lora_adapter_metadata does not hold a JSON object"),
        (
            '{"transformer.megatron_core": "this", "transformer.megatron_config": {"a": 1}}',
            "asks for megatron_core, a module that peft imports by its name",
        ),
    ],
)
def test_what_is_written_beside_the_tensors(
    metadata: str, says: str, wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(1)}, path, {"lora_adapter_metadata": metadata})
    assert check(wan, "--lora", str(path)) == 2
    assert says in capsys.readouterr().err
    assert "this" not in sys.modules


def test_a_model_of_transformers(wan: Path, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(wan / "text_encoder", "--lora", str(published)) == 2
    assert "is not a model of diffusers, which --lora is for; a peft adapter is a folder" in capsys.readouterr().err


def test_values_and_scales_that_are_not_the_file_s(wan: Path, by_peft: Tensors) -> None:
    tensors = with_alpha(by_peft, 2.0)
    layer = "blocks.0.attn1.to_q"

    def judged(change: Callable[[Any], None]) -> lora.Result:
        model = diffusers.WanTransformer3DModel.from_pretrained(wan / "transformer")

        def load(given: Tensors) -> None:
            for key, alpha in [(key, given.pop(key)) for key in list(given) if key.endswith(".alpha")]:
                given[f"{key.removesuffix('alpha')}lora_up.weight"] *= alpha.item() / RANK
            renamed = {k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): t for k, t in given.items()}
            model.load_lora_adapter(renamed, prefix=None, adapter_name="of_the_file", low_cpu_mem_usage=True)
            with torch.no_grad():
                change(model.get_submodule(layer))

        return lora.judge(lora.File(Path("x"), tensors, None), "Wan", {"": model}, load, How())

    assert not judged(lambda layer: None).is_loud
    (found,) = judged(lambda layer: layer.lora_A["of_the_file"].weight[0].add_(1)).findings
    assert (found.key, found.verdict, found.source) == (
        f"{layer}.lora_A.weight",
        "overwritten",
        f"{layer}.lora_down.weight",
    )
    (found,) = judged(lambda layer: layer.scaling.update(of_the_file=2.0)).findings
    assert (found.key, found.why) == (layer, "its scale is 1, but by the file's alpha it should be 0.5")

    def merged(layer: Any) -> None:
        layer.lora_A["of_the_file"].weight.add_(layer.lora_B["of_the_file"].weight.sum())

    assert judged(merged).notes[-1] == "merged by diffusers from several of the file's tensors, and not compared: 1"

"""An adapter for a language, which Wav2Vec2 (MMS) reads over what the checkpoint gave: by itself, or with `target_lang`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.renamed import verdicts
from tiedquiet import LoadError, Verdict
from tiedquiet.doors import languages

SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 10,
    "conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "adapter_attn_dim": 4,
    "do_stable_layer_norm": True, "feat_extract_norm": "layer",
}  # fmt: skip
VOCABULARIES = {"eng": 10, "fra": 12}
MODES = ["on", "repair", "strict"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**SIZES))
    model.save_pretrained(tmp_path)
    for language, size in VOCABULARIES.items():
        adapter = {key: torch.randn_like(value) for key, value in model._get_adapters().items()}
        adapter |= {"lm_head.weight": torch.randn(size, 16), "lm_head.bias": torch.randn(size)}
        save_file(adapter, tmp_path / f"adapter.{language}.safetensors", {"format": "pt"})
    return tmp_path


def load(folder: Path, language: str, mode: str = "on", cls: Any = Wav2Vec2ForCTC, **how: Any) -> Any:
    how |= {} if language == "eng" else {"ignore_mismatched_sizes": True}
    with tiedquiet.enable(mode):
        return cls.from_pretrained(folder, target_lang=language, **how)


def adapter_of(folder: Path, language: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"adapter.{language}.safetensors")


def holds(model: Any, tensors: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return all(torch.equal(state[key], value) for key, value in tensors.items())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("language", VOCABULARIES)
def test_what_an_adapter_for_a_language_replaces_is_not_lost(
    language: str, mode: str, folder: Path, printed: Printed
) -> None:
    model = load(folder, language, mode)
    assert holds(model, adapter_of(folder, language))
    assert str(tiedquiet.check(model)).endswith("tensors came from the checkpoint; the load was sound")
    assert printed.loud == []


@pytest.mark.parametrize("mode", MODES)
def test_it_is_read_later(mode: str, folder: Path) -> None:
    with tiedquiet.enable(mode):
        model = Wav2Vec2ForCTC.from_pretrained(folder)
        model.load_adapter("fra")
    assert holds(model, adapter_of(folder, "fra"))
    assert verdicts(model) == {}
    assert tiedquiet.check(model).total == len(model.state_dict())


def test_a_model_that_nobody_saw_being_loaded(folder: Path) -> None:
    with tiedquiet.enable("off"):
        model = Wav2Vec2ForCTC.from_pretrained(folder)
        model.load_adapter("eng")
    model.load_adapter("fra")
    assert tiedquiet.check(model).stored == len(adapter_of(folder, "fra"))


def test_what_the_checkpoint_lacks_and_the_adapter_has(folder: Path, printed: Printed) -> None:
    path, adapter = folder / "model.safetensors", adapter_of(folder, "eng")
    save_file({key: value for key, value in load_file(path).items() if key not in adapter}, path, {"format": "pt"})
    model = load(folder, "eng", "strict")
    assert holds(model, adapter)
    assert tiedquiet.check(model).ok
    assert "MISSING" not in printed.report
    assert any(
        "reported missing but read from adapter.eng.safetensors: lm_head.bias" in line for line in printed.confirmed
    )


class WritesInEval(Wav2Vec2ForCTC):
    def eval(self) -> Any:
        self.lm_head.weight.data.zero_()
        return super().eval()


@pytest.mark.parametrize("mode", ["on", "repair"])
@pytest.mark.parametrize("language", VOCABULARIES)
def test_what_is_written_over_the_adapter_is_lost(language: str, mode: str, folder: Path) -> None:
    model, adapter = load(folder, language, mode, WritesInEval), adapter_of(folder, language)
    assert holds(model, adapter) is (mode == "repair")
    assert verdicts(model) == ({} if mode == "repair" else {"lm_head.weight": Verdict.OVERWRITTEN})


def test_numbers_that_are_too_large_for_the_model(folder: Path) -> None:
    adapter = adapter_of(folder, "eng")
    adapter["lm_head.bias"].fill_(1e6)
    save_file(adapter, folder / "adapter.eng.safetensors", {"format": "pt"})
    assert verdicts(load(folder, "eng", dtype=torch.float16)) == {"lm_head.bias": Verdict.OVERWRITTEN}


def test_numbers_that_are_too_large_are_told_of_an_adapter_that_is_read_later(folder: Path, printed: Printed) -> None:
    adapter = adapter_of(folder, "eng")
    adapter["lm_head.bias"].fill_(1e6)
    save_file(adapter, folder / "adapter.eng.safetensors", {"format": "pt"})
    model = Wav2Vec2ForCTC.from_pretrained(folder, dtype=torch.float16)
    model.load_adapter("eng")
    assert verdicts(model) == {"lm_head.bias": Verdict.OVERWRITTEN}
    assert any("lm_head.bias by the cast to float16" in line for line in printed.loud)
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match=r"lm_head\.bias by the cast to float16"):
        model.load_adapter("eng")


def test_a_number_at_the_limit_of_its_type_that_the_adapter_has(folder: Path) -> None:
    adapter = adapter_of(folder, "eng")
    adapter["lm_head.bias"].fill_(torch.finfo(torch.float16).max)
    save_file(adapter, folder / "adapter.eng.safetensors", {"format": "pt"})
    assert tiedquiet.check(load(folder, "eng", "strict", dtype=torch.float16)).ok


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_read", [True, False])
def test_a_pickle_is_read_and_where_it_must_not_be_nothing_is_put_back(
    is_read: bool, mode: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, path = adapter_of(folder, "eng"), folder / "adapter.eng.safetensors"
    path.unlink()
    torch.save(adapter, path.with_suffix(".bin"))
    if not is_read:
        monkeypatch.setattr(torch, "__version__", "2.9.1")
    model = load(folder, "eng", mode)
    assert holds(model, adapter)
    assert verdicts(model) == ({} if is_read else dict.fromkeys(adapter, Verdict.UNPROVEN))


def test_with_pickles_asked_for_the_safetensors_are_not_looked_at(folder: Path) -> None:
    torch.save({key: value + 1 for key, value in adapter_of(folder, "eng").items()}, folder / "adapter.eng.bin")
    model = Wav2Vec2ForCTC.from_pretrained(folder)
    model.load_adapter("eng", use_safetensors=False)
    assert verdicts(model) == {}


@pytest.mark.parametrize("mode", MODES)
def test_where_the_file_is_not_found_again_nothing_is_claimed(
    mode: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(languages, "_FORMS", ())
    model, adapter = load(folder, "eng", mode), adapter_of(folder, "eng")
    assert holds(model, adapter)
    assert verdicts(model) == dict.fromkeys(adapter, Verdict.UNPROVEN)


@pytest.mark.parametrize("is_later", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_if_the_guard_fails_the_adapter_is_read_all_the_same(
    mode: str, is_later: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, printed: Printed
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(languages, "_files_of", broken)
    model = Wav2Vec2ForCTC.from_pretrained(folder) if is_later else None

    def run() -> Any:
        if model is None:
            return load(folder, "eng", mode)
        with tiedquiet.enable(mode):
            model.load_adapter("eng")
        return model

    if mode == "strict":
        with pytest.raises(LoadError, match="broken on purpose"):
            run()
    else:
        assert holds(run(), adapter_of(folder, "eng"))
        assert any("broken on purpose" in line for line in printed.loud)

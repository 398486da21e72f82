"""Code that comes with a checkpoint, some of it written for transformers 4."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.gate.test_broken import write
from tests.gate.test_check import check, config_of

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


def test_what_a_list_of_transformers_4_ties_is_told_tensor_by_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """BERT's list had a bias and the end of a name: to tie the bias to the embedding would give it that matrix."""
    keys, right = '["predictions.bias", "decoder.weight", "(odd"]', '"predictions.decoder.weight": "embed.weight"'
    more = """self.predictions = torch.nn.Module()
        self.predictions.decoder = torch.nn.Linear(4, 8)
        self.predictions.bias = %s
        self.post_init()"""
    tied = "self.predictions.decoder.bias"
    for bias, said in ((tied, f'"predictions.bias": "{tied[5:]}"'), ("torch.nn.Parameter(torch.zeros(8))", None)):
        said = said or '"predictions.bias": "NAME_OF_WHAT_IT_IS_TIED_TO"'
        folder = remote(tmp_path / str(len(bias)), "self.post_init()", more % bias)
        text = (folder / "modeling_my.py").read_text().replace('{"head.weight": "embed.weight"}', keys)
        (folder / "modeling_my.py").write_text(text)
        assert check(folder, "--trust-remote-code") == 2
        assert f"write _tied_weights_keys = {{{said}, {right}}}" in capsys.readouterr().err


@pytest.mark.parametrize("code", ["0", "3", "", "None", "'bye'"])
@pytest.mark.parametrize("way", ["--trust-remote-code", "--class"])
def test_code_that_is_let_run_does_not_choose_the_status(
    way: str, code: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script is no module: it leaves when it is imported."""
    monkeypatch.chdir(tmp_path)
    name = f"leaves_{way[2]}_{len(code)}_{code[:1].isdigit()}_{code == '0'}"
    source = f"import sys\nfrom transformers import GPT2LMHeadModel\nclass M(GPT2LMHeadModel): pass\nsys.exit({code})\n"
    for place in (good, tmp_path):
        (place / f"{name}.py").write_text(source)
    config_of(good, architectures=["M"], auto_map={"AutoModelForCausalLM": f"{name}.M"})
    assert check(good, way, *[f"{name}.M"] * (way == "--class")) == 2
    says = "bye" if "bye" in code else f"code that was run ended the program, with status {code or None}"
    assert capsys.readouterr().err == f"tiedquiet: {says}\n"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("..", "there is no class .. to load it as: TypeError: "),
        ("GPT2LMHeadModal", "there is no class GPT2LMHeadModal to load it as: transformers has none of that name, and"),
        ("is_torn.M", "there is no class is_torn.M to load it as: SyntaxError: "),
        ("fails.M", "there is no class fails.M to load it as: ZeroDivisionError: division by zero"),
        ("lacks.M", "there is no class lacks.M to load it as: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ],
)
def test_a_class_of_the_user_s_that_is_not_to_be_had(
    name: str,
    says: str,
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for module, source in {"is_torn": "class M(", "fails": "1 / 0", "lacks": "import nowhere_at_all"}.items():
        (tmp_path / f"{module}.py").write_text(source)
    assert check(good, "--class", name) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("key", ["AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoTokenizer"])
def test_code_for_which_transformers_has_its_own(key: str, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MPT's first class: by `AutoModelForCausalLM` transformers takes its own, and asks nobody."""
    write(good / "modeling_mine.py", "raise SystemExit(9)")
    auto = {"AutoConfig": "modeling_mine.Config", key: "modeling_mine.MyOwnLM"}
    config_of(good, architectures=["MyOwnLM"], auto_map=auto)
    says = "its class MyOwnLM is code that ships with it (modeling_mine.py); --trust-remote-code allows it to run"
    for kind in ("gpt2", "nobody_has_it", 7):
        config_of(good, model_type=kind)
        capsys.readouterr()
        assert check(good) == 2
        is_known = key == "AutoModelForCausalLM" and kind == "gpt2"
        other = f", and without it {key} makes GPT2LMHeadModel of this type: --class GPT2LMHeadModel" * is_known
        assert capsys.readouterr().err == f"tiedquiet: {good}: {says}{other}\n"
    config_of(good, model_type="gpt2")
    assert check(good, "--class", "GPT2LMHeadModel") == 0
    if key == "AutoModelForCausalLM":
        assert type(AutoModelForCausalLM.from_pretrained(good)).__name__ == "GPT2LMHeadModel"

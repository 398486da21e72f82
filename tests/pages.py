"""`python -m tests.pages [--write]`: run what README.md and docs/ show, and compare it with what they show.

A `console` block is a session of a shell: its commands, each after `$ `, are run, and what they print must be what
stands there, line for line. A `python` block that begins with the name of a file is that file. The commands run in a
folder with the checkpoints that `stage` makes. `--write` puts the real output into the pages.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    UMT5EncoderModel,
)

from tests.checkpoints import gpt2, umt5
from tests.doors.test_from_pretrained import wan_pipeline
from tests.gate import originals

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What differs from run to run: a path in front of a file's name, numbers of seconds.
_VARIES = [(re.compile(r"(?<![\w.])/(?:[^\s/:()]+/)+"), ".../"), (re.compile(r"\b\d+(\.\d+)? s\b"), "N s")]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page, of these languages or of all."""
    text = page.read_text(encoding="utf-8")
    found = [Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2]) for match in _FENCE.finditer(text)]
    return [block for block in found if not languages or block.language in languages]


def sections(page: Path) -> dict[str, str]:
    """The text below each heading of a page, up to the next heading."""
    parts = re.split(r"^##+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def fenced(text: str, language: str) -> list[str]:
    """The fenced blocks of one language in a section."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def program(block: Block) -> str:
    """The name of the file that a `python` block is; empty if it is none."""
    name = re.match(r"# (\w+\.py)\b", block.text)
    return name[1] if name and block.language == "python" else ""


FALSE_ROW = """
from transformers import GPT2LMHeadModel


class MyModel(GPT2LMHeadModel):
    _tied_weights_keys = None

    def tie_weights(self, *args, **kwargs):
        self.lm_head.weight = self.transformer.wte.weight
"""
LOST = """
import torch
from torch import nn
from transformers import GPT2Config, PreTrainedModel


class Attention(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, size))
        self.register_buffer("inv_freq", 10000 ** (-torch.arange(0, size, 2) / size), persistent=False)


class OldModel(PreTrainedModel):
    config_class = GPT2Config

    def __init__(self, config):
        super().__init__(config)
        self.attention = Attention(config.n_embd)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, Attention):
            module.weight.data.normal_()
"""


def stage(folder: Path) -> None:
    """Write the checkpoints that the pages speak of, and the programs that they show."""
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(gpt2())
    _with_code(gpt, folder / "my-model", "MyModel", "modeling_mymodel", FALSE_ROW)
    scope: dict[str, type[PreTrainedModel]] = {}
    exec(LOST, scope)
    _with_code(scope["OldModel"](gpt2()), folder / "old-model", "OldModel", "modeling_oldmodel", LOST)
    _with_its_flag_off(gpt, folder / "untied-model")
    _with_its_flag_off(UMT5EncoderModel(umt5()), folder / "wan" / "text_encoder")
    index = {"text_encoder": ["transformers", "UMT5EncoderModel"]}
    (folder / "wan" / "model_index.json").write_text(json.dumps(index))
    _single_files(folder)
    _run_of_a_llava(folder)
    gpt.save_pretrained(folder / "cut-model")
    weights = folder / "cut-model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    for page in PAGES:
        for block in blocks(page, "python"):
            if name := program(block):
                (folder / name).write_text(block.text)


def _single_files(folder: Path) -> None:
    """Files in the form of their authors, and folders with the configs alone."""
    from diffusers import WanTransformer3DModel

    whole = wan_pipeline(folder / "whole")
    tensors = originals.wan(WanTransformer3DModel.from_pretrained(whole / "transformer"))
    save_file(tensors, folder / "wan2.1_t2v.safetensors")
    shutil.copytree(whole, folder / "wan-configs", ignore=shutil.ignore_patterns("*.safetensors"))
    models = originals.sd_pipeline(folder / "sd-configs")
    save_file(originals.stable_diffusion(*models), folder / "sd.safetensors")


def _run_of_a_llava(folder: Path) -> None:
    """`base`, the data and `run`: a hundred steps of training, with their checkpoint."""
    tokens = torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, folder / "data.pt")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision = CLIPVisionConfig(**size, image_size=16, patch_size=8)
    text = LlamaConfig(**size, num_key_value_heads=2, vocab_size=64)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    LlavaForConditionalGeneration(config).save_pretrained(folder / "base")
    data = [{"input_ids": row, "labels": row} for row in tokens]
    how = {"max_steps": 100, "save_steps": 100, "learning_rate": 3e-3, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(str(folder / "run"), use_cpu=True, logging_strategy="no", **how)
    model = LlavaForConditionalGeneration.from_pretrained(folder / "base")
    with redirect_stdout(StringIO()):
        Trainer(model, arguments, train_dataset=data).train()


def _with_code(model: PreTrainedModel, folder: Path, name: str, module: str, code: str) -> None:
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": [name], "auto_map": {"AutoModelForCausalLM": f"{module}.{name}"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / f"{module}.py").write_text(code)


def _with_its_flag_off(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


def session(block: Block, folder: Path) -> str:
    """What a `console` block really prints, commands included."""
    lines = []
    for command in [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]:
        lines += [f"$ {command}", *run(command, folder)]
    return "\n".join(lines) + "\n"


def run(command: str, folder: Path) -> list[str]:
    """The lines that a shell's command prints, progress bars and colours apart."""
    clean = {key: value for key, value in os.environ.items() if key != "TIEDQUIET"}
    changes = {
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), clean["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "TERM": "dumb",
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**clean, **changes},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout.decode())
    return [line.rstrip() for line in text.rstrip("\n").split("\n") if "%|" not in line] if text else []


def comparable(text: str) -> list[str]:
    """Lines without what differs from run to run."""
    for pattern, constant in _VARIES:
        text = pattern.sub(constant, text)
    return [line.rstrip() for line in text.rstrip().splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.pages", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the real output into the pages")
    write = parser.parse_args().write
    differ = 0
    with tempfile.TemporaryDirectory() as temporary:
        stage(Path(temporary))
        for page in PAGES:
            for block in blocks(page, "console"):
                real = session(block, Path(temporary))
                if comparable(real) == comparable(block.text):
                    continue
                differ += 1
                print(f"{block} shows what is not printed; printed is:\n{real}")
                if write:
                    for pattern, constant in _VARIES[:1]:
                        real = pattern.sub(constant, real)
                    page.write_text(page.read_text().replace(f"```console\n{block.text}```", f"```console\n{real}```"))
    return int(bool(differ) and not write)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.gate.fuzz [--from N] [--count N]`: folders with something wrong in them, and how `check` ends on each.

A number makes the same folder every time. What is wrong is one to three changes in one to three of its files: another type,
deep nesting, NaN, a huge number, odd text, a name that is missing or leads elsewhere, bytes that are torn, flipped or gone.
"""

import argparse
import io
import json
import os
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, T5EncoderModel

from benchmarks.census.loads import limited as in_time
from tests.checkpoints import gpt2, t5
from tests.gate import fuzz_kinds
from tests.gate.fuzz_kinds import Kind
from tiedquiet.__main__ import main

TEXTS = ("", "x", "..", "/etc", "a/b", "\n::error::x", "\x1b[2J", "\0", "\u202e", "é" * 9, "😀", "\ud800", "x" * 5000, "GPT2Config", "BertModel", "float16", "int8", "nan", "{0}", "%s", "*(", "model.safetensors", "__class__", "auto", "os.system")  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 7, 10**30, -(10**30), 2**63, 0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf"))
WHOLE_FILES = (b"", b"{", b"[]", b"null", b"{}", b"NaN", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b'{"a":' * 3000 + b"1" + b"}" * 3000, b"[" * 100000, b"1" * 5000, b'{"a": 1, "a": 2}', b"\x80\x04.", b"PK\x03\x04", b"GGUF", b"version https://git-lfs.github.com/spec/v1\n", bytes(200), b"\xff" * 200)  # fmt: skip

MORE, SINGLE = 100_000, 1_000_000  # from these numbers on it is the folders, and the single files, of fuzz_kinds

_MOST_SECONDS = 60


def make(top: Path) -> list[Path]:
    """The sound folders, one of each kind."""
    model = GPT2LMHeadModel(gpt2())
    model.save_pretrained(top / "whole")
    model.save_pretrained(top / "shards", max_shard_size="8KB")
    for name, form in {"pickle": True, "old_pickle": False}.items():
        model.save_pretrained(top / name)
        (top / name / "model.safetensors").unlink()
        torch.save(model.state_dict(), top / name / "pytorch_model.bin", _use_new_zipfile_serialization=form)
    model.save_pretrained(top / "run")
    (top / "run" / "trainer_state.json").write_text('{"global_step": 1}')
    experts = MixtralConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)  # fmt: skip
    MixtralForCausalLM(experts).save_pretrained(top / "experts")
    index: dict[str, Any] = {
        "_class_name": "P",
        "text_encoder": ["transformers", "T5EncoderModel"],
        "unet": [None, None],
    }
    T5EncoderModel(t5()).save_pretrained(top / "pipe" / "text_encoder")
    with suppress(ImportError):
        import diffusers

        vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2)
        vae.save_pretrained(top / "pipe" / "vae")
        diffusers.DDIMScheduler().save_pretrained(top / "pipe" / "scheduler")
        index |= {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (top / "pipe" / "model_index.json").write_text(json.dumps(index))
    with suppress(ImportError):
        import peft

        base = GPT2LMHeadModel.from_pretrained(top / "whole")
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        peft.get_peft_model(base, config).save_pretrained(top / "adapter")
    return sorted(path for path in top.iterdir() if path.is_dir())


def spoil(random: Random, folder: Path, own: Callable[..., None] | None = None) -> None:
    """Change something in a folder.

    Args:
        random: what is drawn from.
        folder: it.
        own: changes what this kind of folder has and others have not.
    """
    if own is not None and random.random() < 0.6:
        with suppress(ValueError, UnicodeEncodeError):
            own(random, folder, _changed)
        if random.random() < 0.7:
            return
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
        if not files:
            return
        path = random.choice(files)
        way = random.random()
        if path.suffix == ".json" and way < 0.75:
            _change_json(random, path)
        elif path.suffix == ".safetensors" and way < 0.7:
            _change_header(random, path)
        elif way < 0.8:
            _change_bytes(random, path)
        else:
            _change_file(random, path)


def value(random: Random, depth: int = 0) -> Any:
    """Any value of JSON."""
    kinds: list[Callable[[], Any]] = [
        lambda: random.choice(TEXTS),
        lambda: random.choice(NUMBERS),
        lambda: random.choice((None, True, False)),
        lambda: random.choice(TEXTS) + random.choice(TEXTS),
    ]
    if depth < 3:
        kinds += [
            lambda: [value(random, depth + 1) for _ in range(random.randrange(4))],
            lambda: {random.choice(TEXTS): value(random, depth + 1) for _ in range(random.randrange(4))},
        ]
    return random.choice(kinds)()


def _changed(random: Random, content: Any) -> Any:
    if isinstance(content, dict) and content and random.random() < 0.85:
        key = random.choice(sorted(content))
        way = random.random()
        rest = {k: v for k, v in content.items() if k != key}
        if way < 0.1:
            return rest
        if way < 0.25:
            return {**rest, random.choice(TEXTS): content[key]}
        if way < 0.35:
            return {**content, random.choice(TEXTS): value(random)}
        return {**content, key: _changed(random, content[key])}
    if isinstance(content, list) and content and random.random() < 0.7:
        place = random.randrange(len(content))
        return [*content[:place], _changed(random, content[place]), *content[place + 1 :]]
    return value(random)


def _change_json(random: Random, path: Path) -> None:
    with suppress(ValueError, RecursionError):
        content = json.loads(path.read_bytes())
        path.write_text(json.dumps(_changed(random, content)), encoding="utf-8", errors="surrogatepass")


def _change_header(random: Random, path: Path) -> None:
    stored = path.read_bytes()
    length = int.from_bytes(stored[:8], "little")
    with suppress(ValueError, RecursionError):
        header = json.dumps(_changed(random, json.loads(stored[8 : 8 + length]))).encode("utf-8", "surrogatepass")
        size = random.choice((len(header), len(header), len(header), 0, 2**63, 2**64 - 1, len(header) + 1))
        path.write_bytes(size.to_bytes(8, "little") + header + stored[8 + length :])


def _change_bytes(random: Random, path: Path) -> None:
    stored = bytearray(path.read_bytes())
    way = random.randrange(4)
    if way == 0:
        stored = bytearray(random.choice(WHOLE_FILES))
    elif way == 1:
        del stored[random.randrange(len(stored) + 1) :]
    elif way == 2 and stored:
        for _ in range(random.choice((1, 3, 50))):
            stored[random.randrange(min(len(stored), random.choice((64, 100000))))] = random.randrange(256)
    else:
        stored += bytes(random.randrange(256) for _ in range(random.randrange(100)))
    path.write_bytes(stored)


def _change_file(random: Random, path: Path) -> None:
    way = random.randrange(6)
    path.unlink()
    if way == 1:
        path.mkdir()
    elif way == 2:
        path.symlink_to(path.name)
    elif way == 3:
        os.mkfifo(path)
    elif way == 4:
        path.symlink_to("/etc/hostname")
    elif way == 5:
        path.write_bytes(random.choice(WHOLE_FILES))


def run(number: int, sound: list[Kind], top: Path) -> tuple[int, str]:
    """How `check` ends on one folder, and what is wrong with that; empty if nothing is."""
    random = Random(number)
    folder = top / f"folder{number}"
    kind = random.choice(sound)
    shutil.copytree(kind.folder, folder)
    try:
        spoil(random, folder, kind.spoil)
        options = [option for option in ("--json", "--quiet", "--all", "--resume") if random.random() < 0.2]
        given = kind.arguments(folder)
        if "--config" in given:  # which --resume goes with nowhere
            options = [option for option in options if option != "--resume"]
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), in_time(_MOST_SECONDS, KeyboardInterrupt):
            status = main(["check", *given, *options])
        return status, _fault(status, out.getvalue(), err.getvalue(), options)
    except BaseException as error:
        return 3, f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder)


def _fault(status: int, out: str, err: str, options: list[str]) -> str:
    if status not in (0, 1, 2):
        return f"status {status}"
    if not all(letter.isprintable() or letter == "\n" for letter in out + err):
        return f"control characters: {out + err!r}"
    if status == 2 and "interrupted" in err:
        return f"over {_MOST_SECONDS} s"
    if status == 2 and (err.count("\n") != 1 or not err.startswith("tiedquiet: ") or "should not happen" in err):
        return f"not one line: {err}"
    if status != 2 and err:
        return f"stderr: {err}"
    if "--json" in options:
        return "" if json.loads(out)["status"] == status else "the JSON has another status"
    if status == 2:
        return f"stdout: {out}" if out else ""
    return "" if out or (status == 0 and "--quiet" in options) else "nothing is printed"


@contextmanager
def limited(gigabytes: int = 24) -> Iterator[None]:
    """A limit on memory: a config may ask for any amount."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(numbers: Iterator[int] | range, say: Callable[[str], Any] = print) -> Counter[int]:
    """How often each status came out; 3 where something else did, which is said."""
    count: Counter[int] = Counter()
    with tempfile.TemporaryDirectory() as temporary, limited():
        top = Path(temporary)
        sound, more, single = [Kind(folder) for folder in make(top / "sound")], list[Kind](), list[Kind]()
        for number in numbers:
            if MORE <= number < SINGLE and not more:
                more = fuzz_kinds.make(top / "more")
            if number >= SINGLE and not single:
                single = fuzz_kinds.make_single(top / "single")
            kinds = single if number >= SINGLE else more if number >= MORE else sound
            status, fault = run(number, kinds, top)
            count[3 if fault else status] += 1
            if fault:
                say(f"{number}: {fault[:600]}")
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.gate.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    given = parser.parse_args()
    counted = fuzz(range(given.first, given.first + given.count))
    print(", ".join(f"status {status}: {counted[status]:,}" for status in (0, 1, 2)), f"; faults: {counted[3]:,}")
    sys.exit(bool(counted[3]))

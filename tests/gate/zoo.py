"""Folders that strangers may have made, each to get code run, a file read or a question asked. Made anew on every run.

The pickles follow the recipes with which picklescan, modelscan and fickling test themselves.
"""

import json
import os
import pickle
import pickletools
import shutil
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, T5EncoderModel

from tests.checkpoints import gpt2, t5

CODE = "open({mark!r}, 'w').write('ran')\nfrom transformers import GPT2LMHeadModel as Model, GPT2Config as Config\n"


class Call:
    """What is unpickled by calling something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def named(module: str, name: str, *arguments: str) -> bytes:
    """A pickle of protocol 0 that calls what need not be importable here."""
    words = "".join(f"V{word}\n" for word in arguments)
    return f"c{module}\n{name}\n({words}tR.".encode()


def pickles(mark: str) -> dict[str, bytes]:
    """Pickles that would leave a mark."""
    touch, python = f"touch {mark}", f"open({mark!r}, 'w').write('ran')"
    plain = {
        "system": (os.system, touch),
        "exec": (exec, python),
        "eval": (eval, python),
        "open": (open, mark, "w"),
        "mkdir": (os.mkdir, mark),
        "import": (__import__, "evil"),
    }
    found = {f"reduce_{name}": pickle.dumps({"x": Call(*call)}) for name, call in plain.items()}
    for protocol in range(5):
        found[f"protocol_{protocol}"] = pickle.dumps(Call(os.system, touch), protocol)
    by_name = {
        "posix": ("posix", "system", touch),
        "subprocess": ("subprocess", "getoutput", touch),
        "runpy": ("runpy", "run_path", "evil.py"),
        "pty": ("pty", "spawn", touch),
        "timeit": ("timeit", "timeit", python),
        "bdb": ("bdb", "Bdb.run", python),
        "importlib": ("importlib", "import_module", "evil"),
        "torch_load": ("torch.serialization", "load", "other.bin"),
        "torch_compile": ("torch.utils._config_module", "ConfigModule.load_config", "x"),
        "torch_unsafe": ("torch._inductor.codecache", "compile_file", touch),
        "numpy": ("numpy.testing._private.utils", "runstring", python),
        "builtins_getattr": ("builtins", "getattr", "os", "system"),
        "operator": ("operator", "attrgetter", "system"),
        "code": ("code", "interact", "x"),
        "ctypes": ("ctypes", "CDLL", "evil.so"),
    }
    found |= {f"name_{name}": named(*call) for name, call in by_name.items()}
    found["optimised"] = pickletools.optimize(pickle.dumps(Call(os.system, touch)))
    found["then_broken"] = named("os", "system", touch)[:-1] + b"\xff\xff junk"
    found["nested"] = pickle.dumps(Call(pickle.loads, pickle.dumps(Call(os.system, touch))))
    found["instance"] = f"(S'{touch}'\nios\nsystem\n.".encode()
    found["object"] = f"(cos\nsystem\nS'{touch}'\no.".encode()
    return found


def as_archive(path: Path, content: bytes, name: str = "archive/data.pkl") -> None:
    """The form of torch since 1.6."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
        archive.writestr("archive/version", "3\n")


class Zoo:
    """The folders below a top folder.

    Attributes:
        mark: a file that is there if code was run.
        wanted: the exit statuses that are right for each.
        arguments: what `check` is given of those that are not a folder as a whole.
    """

    def __init__(self, top: Path) -> None:
        self.top, self.mark, self.wanted = top, str(top / "RAN"), dict[str, set[int]]()
        self.arguments: dict[str, list[str]] = {}
        GPT2LMHeadModel(gpt2()).save_pretrained(top / "good")
        T5EncoderModel(t5()).save_pretrained(top / "pipe" / "text_encoder")
        self._write(top / "pipe" / "model_index.json", {"_class_name": "P", "text_encoder": ["transformers", "T5EncoderModel"]})  # fmt: skip
        self._code()
        self._pickles()
        self._places()
        self._adapters()
        self._sentences()
        self._single_files()

    def _copy(self, name: str, *wanted: int, source: str = "good", **change: Any) -> Path:
        self.wanted[name] = set(wanted)
        folder = shutil.copytree(self.top / source, self.top / name)
        if change:
            path = folder / ("config.json" if source == "good" else "model_index.json")
            config = json.loads(path.read_text()) | change
            self._write(path, {key: value for key, value in config.items() if value is not ...})
        (folder / "evil.py").write_text(CODE.format(mark=self.mark))
        return folder

    @staticmethod
    def _write(path: Path, content: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

    def _code(self) -> None:
        own = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
        copy = self._copy
        copy("dotted", 2, architectures=["dotted.evil.Model"])
        copy("plain_module", 2, architectures=["evil.Model"])
        copy("own_class", 2, architectures=["Model"], auto_map=own)
        copy("own_type", 2, architectures=..., model_type="unheard_of", auto_map=own)
        copy("no_type", 2, architectures=..., model_type=..., auto_map=own)
        copy("elsewhere", 2, architectures=["Model"], auto_map={"AutoModel": "some/repo--evil.Model"})
        copy("kernel", 2, _attn_implementation="somebody/kernel")
        copy("kernel_inside", 2, text_config={"attn_implementation": {"": "somebody/kernel@main:x"}})
        copy("other_weights", 2, transformers_weights="../good/model.safetensors")
        copy("no_model", 2, architectures=["pipeline"])
        copy("tokeniser_for_model", 2, architectures=["AutoTokenizer"])
        beside = {
            "generation_config.json": {"custom_generate": "evil", "trust_remote_code": True, "auto_map": own},
            "custom_generate/generate.py": CODE.format(mark=self.mark),
            "tokenizer_config.json": {"tokenizer_class": "evil.Model", "auto_map": {"AutoTokenizer": ["evil.Model", None]}},
            "processor_config.json": {"processor_class": "evil.Model", "auto_map": {"AutoProcessor": "evil.Model"}},
            "preprocessor_config.json": {"image_processor_type": "evil.Model", "auto_map": {"AutoImageProcessor": "evil.Model"}},
            "video_preprocessor_config.json": {"auto_map": {"AutoVideoProcessor": "evil.Model"}},
            "chat_template.jinja": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "requirements.txt": "evil",
            "setup.py": CODE.format(mark=self.mark),
            "conftest.py": CODE.format(mark=self.mark),
            "transformers.py": CODE.format(mark=self.mark),
            "accelerate.py": CODE.format(mark=self.mark),
        }  # fmt: skip
        folder = copy("beside", 0)
        for name, content in beside.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        copy("quantised", 0, 2, quantization_config={"quant_method": "evil.Model"})
        quantised = {
            "bitsandbytes": {
                "load_in_4bit": True,
                "bnb_4bit_compute_dtype": "__import__",
                "bnb_4bit_quant_type": "evil",
            },
            "compressed-tensors": {"format": "evil.Model", "config_groups": {"group_0": {"targets": ["evil.Model"]}}},
            "torchao": {"quant_type": {"default": {"_type": "os.system", "_data": {"command": f"touch {self.mark}"}}}},
            "fp8": {"weight_block_size": ["evil.Model", 1], "modules_to_convert": ["(a+)+$"]},
            "mxfp4": {"dequantize": "evil.Model"},
            "gptq": {"bits": 4, "backend": "evil.Model", "tokenizer": "evil.Model"},
            "awq": {"bits": 4, "backend": "evil.Model", "version": "evil"},
            "quark": {"export": {"pack_method": "evil.Model"}, "import": "evil.Model"},
        }
        for name, said in quantised.items():
            copy(f"quantised_{name}", 0, 1, 2, quantization_config={"quant_method": name, **said})
        copy("pipe_dotted", 2, source="pipe", text_encoder=["transformers", "pipe_dotted.evil.Model"])
        copy("pipe_library", 2, source="pipe", text_encoder=["evil", "Model"])
        copy("pipe_own", 1, source="pipe", _class_name=["evil", "Model"], unet=["evil", "Model"])
        copy("pipe_deep_library", 2, source="pipe", text_encoder=["diffusers.utils", "os"])

    def _pickles(self) -> None:
        for name, content in pickles(self.mark).items():
            for form in ("raw", "archive"):
                folder = self._copy(f"bin_{form}_{name}", 2)
                (folder / "model.safetensors").unlink()
                path = folder / "pytorch_model.bin"
                path.write_bytes(content) if form == "raw" else as_archive(path, content)
        content = pickles(self.mark)["reduce_system"]
        folder = self._copy("bin_misnamed", 2)
        (folder / "model.safetensors").unlink()
        as_archive(folder / "pytorch_model.bin", content, "archive/data.pkl.7z")
        folder = self._copy("bin_as_safetensors", 2)
        (folder / "model.safetensors").write_bytes(content)
        folder = self._copy("bin_beside", 0)
        (folder / "pytorch_model.bin").write_bytes(content)
        (folder / "optimizer.pt").write_bytes(content)
        (folder / "training_args.bin").write_bytes(content)
        folder = self._copy("bin_as_shard", 2)
        (folder / "model.safetensors").rename(folder / "x.bin")
        (folder / "x.bin").write_bytes(content)
        self._index(folder, "x.bin")
        folder = self._copy("torchscript", 2)
        (folder / "model.safetensors").unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated
            torch.jit.save(torch.jit.script(torch.nn.ReLU()), folder / "pytorch_model.bin")

    def _index(self, folder: Path, *shards: str) -> None:
        names = load_file(self.top / "good" / "model.safetensors")
        where = {name: shards[i % len(shards)] for i, name in enumerate(names)}
        (folder / "model.safetensors").unlink(missing_ok=True)
        self._write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})

    def _places(self) -> None:
        outside = self.top / "good" / "model.safetensors"
        for name, shard in {"up": "../good/model.safetensors", "absolute": str(outside), "windows": "..\\good\\model.safetensors"}.items():  # fmt: skip
            self._index(self._copy(f"shard_{name}", 2), shard)
        folder = self._copy("shard_link", 2)
        self._index(folder, "a.safetensors")
        (folder / "a.safetensors").symlink_to(outside)
        folder = self._copy("link", 2)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(outside)
        folder = self._copy("config_link", 2)
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to("/etc/hostname")
        self._copy("part_up", 2, source="pipe", text_encoder=..., **{"../good": ["transformers", "GPT2LMHeadModel"]})
        absolute = {str(self.top / "good"): ["transformers", "GPT2LMHeadModel"]}
        self._copy("part_absolute", 2, source="pipe", text_encoder=..., **absolute)
        for name in ("model.safetensors", "config.json", "model_index.json"):
            folder = self._copy(f"pipe_for_{name.partition('.')[0]}", 2)
            (folder / name).unlink(missing_ok=True)
            os.mkfifo(folder / name)
        folder = self._copy("shard_fifo", 2)
        self._index(folder, "a.safetensors")
        os.mkfifo(folder / "a.safetensors")
        folder = self._copy("device", 2)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to("/dev/zero")
        folder = self._copy("long_header", 2)
        with (folder / "model.safetensors").open("wb") as file:
            file.write((3 << 30).to_bytes(8, "little"))
            file.truncate((3 << 30) + 8)
        folder = self._copy("terminal", 0)
        odd = {name: torch.ones(1) for name in ("a\n::add-mask::x", "b\x1b[2J", "c\x00", "d\u202ee", "e" * 5000)}
        path = folder / "model.safetensors"
        save_file({**load_file(path), **odd}, path, {"format": "pt"})

    def _sentences(self) -> None:
        own = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
        for name, status, change in (
            ("sentences", 0, {}),
            ("sentences_dotted", 2, {"type": "evil.Model"}),
            ("sentences_inside", 2, {"type": "sentence_transformers.evil.Model"}),
            ("sentences_up", 2, {"path": "../good"}),
        ):
            self._write(self._copy(name, status) / "modules.json", [own | change])

    def _adapters(self) -> None:
        lora = {"peft_type": "LORA", "base_model_name_or_path": str(self.top / "good"), "target_modules": ["c_attn"], "r": 2, "fan_in_fan_out": True}  # fmt: skip
        tensors = {
            f"base_model.model.transformer.h.0.attn.c_attn.lora_{which}.weight": torch.ones(shape)
            for which, shape in {"A": (2, 16), "B": (48, 2)}.items()
        }

        def adapter(name: str, *wanted: int, **change: Any) -> Path:
            self.wanted[name] = set(wanted)
            folder = self.top / name
            self._write(folder / "adapter_config.json", lora | change)
            (folder / "evil.py").write_text(CODE.format(mark=self.mark))
            save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
            return folder

        mapping = {"base_model_class": "Model", "parent_library": "evil"}
        adapter("adapter", 0, 1, 2, auto_mapping=mapping)
        adapter("adapter_megatron", 2, megatron_config={"x": 1}, megatron_core="evil")
        adapter("adapter_base", 2, base_model_name_or_path="own_class")
        adapter("adapter_base_number", 2, base_model_name_or_path=7)
        adapter("adapter_kind", 2, peft_type="evil.Model")
        folder = adapter("adapter_bin", 2)
        (folder / "adapter_model.safetensors").unlink()
        (folder / "adapter_model.bin").write_bytes(pickles(self.mark)["reduce_system"])

    def _single_files(self) -> None:
        tensors = {
            "model.diffusion_model.x": torch.ones(1),
            "a\n::add-mask::x": torch.ones(1),
            "b\x1b[2J": torch.ones(1),
        }
        own = {"_class_name": "AutoencoderKL", "block_out_channels": [4], "norm_num_groups": 2, "latent_channels": 2}
        evil = ["evil", "Model"]

        def single(name: str, *wanted: int, file: str = "x.safetensors", **files: Any) -> Path:
            folder, self.wanted[name] = self.top / name, set(wanted)
            self.arguments[name] = [f"./{name}/{file}", "--config", f"./{name}/config"]
            for path, content in files.items():
                self._write(folder / "config" / f"{path}.json", content)
            for place in (folder, folder / "config"):
                place.mkdir(parents=True, exist_ok=True)
                (place / "evil.py").write_text(CODE.format(mark=self.mark))
            save_file(tensors, folder / "x.safetensors")
            return folder

        def index(name: str, *wanted: int, **entries: Any) -> Path:
            vae = {"vae": ["diffusers", "AutoencoderKL"]}
            return single(name, *wanted, model_index={"_class_name": "StableDiffusionPipeline", **vae, **entries})

        single("single_class", 2, config=own | {"_class_name": "evil.Model", "auto_map": {"AutoModel": "evil.Model"}})
        single("single_class_list", 2, config=own | {"_class_name": evil})
        single("single_no_config", 2)
        self.arguments["single_no_config"] = ["./single_no_config/x.safetensors"]
        single("single_url", 2, config=own)
        self.arguments["single_url"] = [
            "https://huggingface.co/a/b/blob/main/x.safetensors",
            "--config",
            "./single_url/config",
        ]
        folder = single("single_config_link", 2, config=own)
        (folder / "config" / "config.json").unlink()
        (folder / "config" / "config.json").symlink_to("/etc/hostname")
        folder = single("single_header", 2, config=own)
        with (folder / "x.safetensors").open("wb") as file:
            file.write((3 << 30).to_bytes(8, "little"))
            file.truncate((3 << 30) + 8)
        folder = single("single_fifo", 2, config=own)
        (folder / "x.safetensors").unlink()
        os.mkfifo(folder / "x.safetensors")
        for suffix in ("ckpt", "pt", "safetensors"):
            folder = single(f"single_pickle_{suffix}", 2, config=own, file=f"x.{suffix}")
            (folder / f"x.{suffix}").write_bytes(pickles(self.mark)["reduce_system"])
        index("single_pipe", 2)
        index("single_pipe_library", 2, unet=evil, scheduler=["os", "system"], tokenizer=["evil", "Model"])
        index("single_pipe_class", 2, _class_name=["evil", "Model"])
        index("single_pipe_up", 2, **{"../good": ["transformers", "GPT2LMHeadModel"]})
        folder = index(
            "single_pipe_tokenizer",
            2,
            tokenizer=["transformers", "AutoTokenizer"],
            scheduler=["diffusers", "DDIMScheduler"],
        )
        for part in ("tokenizer", "scheduler"):
            beside = {"tokenizer_class": "evil.Model", "auto_map": {"AutoTokenizer": ["evil.Model", None]}}
            self._write(folder / "config" / part / "tokenizer_config.json", beside)
        with suppress(ImportError):
            from diffusers import AutoencoderKLWan

            vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1], num_res_blocks=1, temperal_downsample=[])
            folder = single("single_terminal", 0)
            vae.save_config(folder / "config")
            save_file({**vae.state_dict(), **tensors, "c" * 5000: torch.ones(1)}, folder / "x.safetensors")

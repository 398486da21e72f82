"""Run by `torchrun`, two processes on CPUs: loads under tensor parallelism or FSDP2. Prints JSON, a line a class, on rank 0."""

import json
import sys
import warnings
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import tiedquiet

KEY = "model.layers.0.self_attn.q_proj.weight"


class MasksInInit(LlamaForCausalLM):
    """Its linear layers own a mask that `__init__` computes."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for module in list(self.modules()):
            if isinstance(module, torch.nn.Linear):
                module.register_buffer("mask", torch.ones(3), persistent=False)


def how(kind: str) -> dict[str, Any]:
    if kind == "tensor parallel":
        return {"tp_plan": "auto"}
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(fsdp_size=2)}


def main(path: str, mode: str, kind: str) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.distributed.init_process_group("gloo")
    for cls in (LlamaForCausalLM, MasksInInit):
        with tiedquiet.enable(mode):
            model = cls.from_pretrained(path, **how(kind))
        weight = model.get_parameter(KEY)
        whole = weight.full_tensor()
        proof = tiedquiet.check(model)
        line = {
            "class": cls.__name__,
            "type": type(weight).__name__,
            "holds": torch.equal(whole, load_file(f"{path}/model.safetensors")[KEY]),
            "stored": proof.stored,
            "verdicts": {finding.key: finding.verdict.value for finding in proof.findings},
        }
        model.to(torch.bfloat16)  # of a DTensor torch swaps the content, which a weak reference to it would forbid
        if torch.distributed.get_rank() == 0:
            print(json.dumps(line), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

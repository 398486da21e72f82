"""Run by `torchrun`, two processes on CPUs: loads under tensor parallelism, FSDP2 or pipeline parallelism.

Prints JSON: a line a class, on rank 0; under pipeline parallelism a line a process.
"""

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

    sizes = {"pp_size": 2} if kind == "pipeline parallel" else {"fsdp_size": 2}
    return {"distributed_config": DistributedConfig(**sizes)}


def verdicts(model: Any) -> dict[str, str]:
    return {finding.key: finding.verdict.value for finding in tiedquiet.check(model).findings}


def each_stage(path: str, mode: str, kind: str) -> None:
    """What each process says of its own layers."""
    with tiedquiet.enable(mode):
        model = LlamaForCausalLM.from_pretrained(path, **how(kind))
    line = {"rank": torch.distributed.get_rank(), "total": tiedquiet.check(model).total, "verdicts": verdicts(model)}
    for rank in range(2):  # one after the other: what two processes print at once may stand in one line
        torch.distributed.barrier()
        if rank == line["rank"]:
            print(json.dumps(line), flush=True)


def saved_by_each(model: Any, path: str, mode: str, kind: str) -> None:
    """What is said where transformers reads what each process has saved of its part."""
    model.save_pretrained(path, distributed_checkpoint=True)
    with tiedquiet.enable(mode):
        again = LlamaForCausalLM.from_pretrained(path, **how(kind))
    (finding,) = tiedquiet.check(again).findings
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"verdict": finding.verdict.value, "why": finding.why}), flush=True)


def main(path: str, mode: str, kind: str) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.disable_progress_bar()
    torch.distributed.init_process_group("gloo")
    if kind == "pipeline parallel":
        each_stage(path, mode, kind)
    for cls in () if kind == "pipeline parallel" else (LlamaForCausalLM, MasksInInit):
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
            "verdicts": verdicts(model),
        }
        if cls is LlamaForCausalLM and kind == "distributed checkpoint":
            saved_by_each(model, f"{path}/parts", mode, kind)
            break
        model.to(torch.bfloat16)  # of a DTensor torch swaps the content, which a weak reference to it would forbid
        if torch.distributed.get_rank() == 0:
            print(json.dumps(line), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What makes a step fast or small: compiled blocks, what is computed again backward, the teacher's attention in 8 bits.

What each bought is measured by `benchmarks/distill_step.py`.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tiedquiet.distill.options import fail


def to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round (batch, tokens, heads, dim) to e4m3, which goes to 448; returns it and its scales, (batch, heads)."""
    scale = (x.abs().amax(dim=(1, 3)).float() / 448).clamp(min=1e-12)
    return (x / scale[:, None, :, None]).to(torch.float8_e4m3fn), scale


class Float8Attention(WanAttnProcessor):  # type: ignore[misc]
    """Self-attention whose two products are of 8-bit numbers, for a transformer that only runs forward.

    What all keys or all values have in common is taken out before rounding (https://arxiv.org/abs/2411.10958): softmax
    does not see it in the keys, and of the values it is added again. Left in, it would grow so large in the product's
    sum over all tokens that the sum lost the rest.

    Args:
        attend: FlashAttention-3 (https://arxiv.org/abs/2407.08608) or its like: takes query, key and value in e4m3,
            (batch, tokens, heads, dim), and their scales, (batch, heads), as q_descale, k_descale and v_descale.
    """

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As `WanAttnProcessor` where it is self-attention, but rounded once, after rotation."""
        assert rotary_emb is not None
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states)))
        cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]
        pairs = (x.unflatten(-1, (-1, 2)).unbind(-1) for x in (query, key))
        query, key = (torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2) for a, b in pairs)
        common = value.mean(1, keepdim=True)
        (query, q), (key, k), (value, v) = map(to_float8, (query, key - key.mean(1, keepdim=True), value - common))
        out = self.attend(query, key, value, q_descale=q, k_descale=k, v_descale=v) + common
        return cast(Tensor, attn.to_out[1](attn.to_out[0](out.flatten(2).type_as(hidden_states))))


def check_float8() -> None:
    """Stop unless the teacher's attention can be in 8 bits here.

    Raises:
        SystemExit: with status 2, after one line.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        fail("--teacher_attention float8: needs a Hopper GPU, such as an H100")
    if not find_spec("fa3_fwd_interface"):
        fail("--teacher_attention float8: needs FlashAttention-3: pip install fa3-fwd")


def save_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what self-attention gave, 70 % of all arithmetic at 32,760 tokens; compute the rest again.

    The feed-forward part's second product is kept as well: its sum runs over several times as many numbers as it gives,
    so no other result saves as much arithmetic for its memory.
    """
    self_attention = "scaled_dot_product" in str(op) and args[0].shape[-2] == args[1].shape[-2]
    narrowing = str(op) in ("aten.mm.default", "aten.addmm.default") and args[-1].shape[0] > args[-1].shape[1]
    return CheckpointPolicy.MUST_SAVE if self_attention or narrowing else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(forward: Callable[..., Tensor], **keep: Any) -> Callable[..., Tensor]:
    """A forward function that is computed again in the backward pass."""

    def again(*inputs: Any) -> Tensor:
        # Wan has no dropout, so there is no random state to preserve.
        return cast(Tensor, checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **keep))

    return again


def speed_up(teacher: WanTransformer3DModel, student: WanTransformer3DModel, args: Namespace) -> None:
    """Choose the teacher's attention and what the student computes again backward; compile the blocks of both.

    A block is told to checkpoint itself, so that what checkpoints is compiled with it, and what FSDP or a hook does
    around the block is not.
    """
    if args.teacher_attention == "float8":  # pragma: no cover - needs a GPU
        from fa3_fwd_interface import flash_attn_func

        for block in teacher.blocks:
            block.attn1.set_processor(Float8Attention(flash_attn_func))
    if args.gradient_checkpointing:
        keep: dict[str, Any] = {}
        if args.gradient_checkpointing == "attention":
            keep["context_fn"] = partial(create_selective_checkpoint_contexts, save_attention)
        for block in student.blocks:
            block.forward = checkpointed(block.forward, **keep)
    if args.compile:
        # It would split each block where DDP's buckets end; a block is small enough for them as it is.
        torch._dynamo.config.optimize_ddp = False
        # On GPUs it leaves gradients of Wan's modulation unwritten: https://github.com/pytorch/pytorch/issues/193061
        wrong = "triton.mix_order_reduction"  # torch 2.10 to 2.13; older ones do not know it
        options = {wrong: False} if wrong in torch._inductor.list_options() else {}
        for block in (*teacher.blocks, *student.blocks):
            block.compile(options=options)


def shard(teacher: WanTransformer3DModel | None, accelerator: Accelerator) -> None:
    """Under FSDP: spread the frozen teacher over all GPUs, too, and leave every rounding of the student to autocast.

    FSDP would compute in bfloat16 what Wan keeps in float32 (modulation, norms), and round the timesteps that it hands
    in to multiples of four.
    """
    for module in (*teacher.blocks, teacher) if teacher else ():
        fully_shard(module)
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()

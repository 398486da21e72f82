"""The shapes that are measured, the arms that are compared, and the arithmetic that a step needs."""

from argparse import Namespace
from typing import Any

# heads, blocks of teacher and student, feed-forward, text width; latent frames, height, width; text tokens
SHAPES: dict[str, dict[str, int]] = {
    "wan2.1-1.3b": {"heads": 12, "blocks": 30, "ffn": 8960, "text": 4096, "f": 21, "h": 60, "w": 104, "tokens": 512},
    "wan2.2-a14b": {"heads": 40, "blocks": 40, "ffn": 13824, "text": 4096, "f": 21, "h": 60, "w": 104, "tokens": 512},
    "tiny": {"heads": 1, "blocks": 4, "ffn": 64, "text": 32, "f": 2, "h": 8, "w": 8, "tokens": 8},
}


# What each arm passes to the example.
LEAN = {"compile": True, "gradient_checkpointing": "attention"}


ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": "blocks"},
    "compiled": {"compile": True},
    "compiled, checkpointing": {"compile": True, "gradient_checkpointing": "blocks"},
    "compiled, checkpointing but attention": LEAN,
    "compiled, checkpointing but attention, float8 teacher": {**LEAN, "teacher_attention": "float8"},
    "compiled, float8 teacher": {"compile": True, "teacher_attention": "float8"},
    "segments: checkpointing": {"gradient_checkpointing": "blocks", "student_steps": 4},
    "segments: compiled": {"compile": True, "student_steps": 4},
    "segments: compiled, checkpointing but attention": {**LEAN, "student_steps": 4},
}


# What --scaling measures: of the velocity the fastest in little memory, of segments what docs/example.md recommends.
SCALED = [
    "compiled, checkpointing but attention, float8 teacher",
    "segments: compiled, checkpointing but attention",
]


# What gradients are held against: as plain, in less memory.
REFERENCE = {False: "checkpointing", True: "segments: checkpointing"}


HEAD, PATCH, CHANNELS = 128, (1, 2, 2), 16


def segments(arm: str) -> bool:
    """Whether an arm learns from cached paths."""
    return "student_steps" in ARMS[arm]


def useful_flops(shape: dict[str, int], student_blocks: int, teacher: bool) -> float:
    """Multiplications and additions that one step needs, with the teacher's forward pass or without.

    A block: self-attention's four projections and its two products over all pairs of tokens; cross-attention's two
    projections over the latents and its two over the text, and its products; the two layers of the feed-forward part.
    """
    tokens, dim, text = latent_tokens(shape), HEAD * shape["heads"], shape["tokens"]
    linear = 2 * tokens * (4 * dim * dim + 2 * dim * dim + 2 * dim * shape["ffn"]) + 2 * text * 2 * dim * dim
    block = linear + 4 * tokens * tokens * dim + 4 * tokens * text * dim
    return float(block * (teacher * shape["blocks"] + 3 * student_blocks))


def latent_tokens(shape: dict[str, int]) -> int:
    return shape["f"] * shape["h"] // PATCH[1] * (shape["w"] // PATCH[2])


def settings(arm: dict[str, Any]) -> Namespace:
    """The example's own settings for such a run."""
    from tiedquiet.distill.options import parse

    args = parse("", ["--pretrained_model_name_or_path", "none", "--student_steps", "0", "--task_weight", "0.05"])
    vars(args).update(arm)
    return args


def wan_transformer(shape: dict[str, int]) -> Any:
    """One of `SHAPES` with random weights, of torch's default type and on its default device."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=shape["heads"],
        attention_head_dim=HEAD,
        ffn_dim=shape["ffn"],
        num_layers=shape["blocks"],
        text_dim=shape["text"],
    )


def models(shape: dict[str, int], device: Any, dtype: str, student_blocks: int | None = None) -> tuple[Any, Any]:
    """Teacher and student with random weights; the teacher in bf16 except for what Wan keeps in float32.

    Args:
        shape: of the teacher.
        device: where they are.
        dtype: of the student.
        student_blocks: half the teacher's if it is None.
    """
    import torch
    from diffusers import WanTransformer3DModel

    from tiedquiet.distill.pipeline import new_student

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        teacher = wan_transformer(shape)
    torch.set_default_dtype(torch.float32)
    # As they begin, gates let almost nothing through and attention is nearly flat: what attention in 8 bits gets wrong
    # would not reach the velocity.
    for block in teacher.blocks:
        torch.nn.init.normal_(block.scale_shift_table)
        torch.nn.init.uniform_(block.attn1.norm_q.weight, 0, 4)
    for name, parameter in teacher.named_parameters():
        if any(kept in name for kept in WanTransformer3DModel._keep_in_fp32_modules):
            parameter.data = parameter.data.float()
    teacher.eval().requires_grad_(False)
    return teacher, new_student(teacher, student_blocks or shape["blocks"] // 2, getattr(torch, dtype)).train()

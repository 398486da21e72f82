"""Tiny models under the names that their authors and other tools give the tensors, which diffusers turns into its own."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel

from tests.checkpoints import TOKENS

Tensors = dict[str, torch.Tensor]

_WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".o.",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm_",
    "norm3": "norm2",
    "norm_.": "norm3.",
    "proj_out": "head.head",
    "scale_shift_table": "modulation",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
}
_VAE = {
    "conv_norm_out": "norm_out",
    "encoder.down_blocks.0.resnets": "encoder.down.0.block",
    "decoder.up_blocks.0.resnets": "decoder.up.0.block",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut",
}


def wan(model: Any) -> Tensors:
    """A WanTransformer3DModel as Wan's authors store it."""
    found = {_renamed(key, _WAN): tensor for key, tensor in model.state_dict().items() if key != "scale_shift_table"}
    return _cloned(found | {"head.modulation": model.scale_shift_table.detach()})


def wan_vae(model: Any) -> Tensors:
    """An AutoencoderKLWan as Wan's authors store it: diffusers' own function tells which of all names become whose."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    became = {new: old for old in _of_wan_vae() for new in convert_wan_vae_to_diffusers({old: 0})}
    return _cloned({became[key]: tensor for key, tensor in model.state_dict().items()})


def _of_wan_vae() -> Iterator[str]:
    ends = [f"residual.{i}.{end}" for i, end in ((0, "gamma"), (2, "weight"), (2, "bias"), (3, "gamma"), (6, "weight"), (6, "bias"))]  # fmt: skip
    ends += [f"{layer}.{end}" for layer in ("shortcut", "resample.1", "time_conv") for end in ("weight", "bias")]
    for side, blocks in (("encoder", "downsamples"), ("decoder", "upsamples")):
        yield from (f"{side}.{blocks}.{i}.{end}" for i in range(16) for end in ends)
        yield from (f"{side}.middle.{i}.{end}" for i in (0, 2) for end in ends[:6])
        attention = ("norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight", "proj.bias")
        yield from (f"{side}.middle.1.{end}" for end in attention)
        yield from (
            f"{side}.{end}" for end in ("conv1.weight", "conv1.bias", "head.0.gamma", "head.2.weight", "head.2.bias")
        )
    yield from (f"{conv}.{end}" for conv in ("conv1", "conv2") for end in ("weight", "bias"))


def sd3(model: Any) -> Tensors:
    """An SD3Transformer2DModel of two layers as its authors store it: queries, keys and values in one, scales swapped."""
    own: Tensors = model.state_dict()
    found: Tensors = {"pos_embed": own["pos_embed.pos_embed"]}
    for end in ("weight", "bias"):
        for new, old in (
            ("pos_embed.proj", "x_embedder.proj"),
            ("context_embedder", "context_embedder"),
            ("proj_out", "final_layer.linear"),
            *((f"time_text_embed.{a}_embedder.linear_{i}", f"{b}_embedder.mlp.{2 * i - 2}") for a, b in (("timestep", "t"), ("text", "y")) for i in (1, 2)),
        ):  # fmt: skip
            found[f"{old}.{end}"] = own[f"{new}.{end}"]
        found[f"final_layer.adaLN_modulation.1.{end}"] = _swapped(own[f"norm_out.linear.{end}"])
        for i in (0, 1):
            ours, theirs = f"transformer_blocks.{i}", f"joint_blocks.{i}"
            for block, parts in (
                ("x", ("to_q", "to_k", "to_v")),
                ("context", ("add_q_proj", "add_k_proj", "add_v_proj")),
            ):
                found[f"{theirs}.{block}_block.attn.qkv.{end}"] = torch.cat(
                    [own[f"{ours}.attn.{part}.{end}"] for part in parts]
                )
            pairs = [("attn.to_out.0", "x", "attn.proj"), ("norm1.linear", "x", "adaLN_modulation.1")]
            pairs += [("ff.net.0.proj", "x", "mlp.fc1"), ("ff.net.2", "x", "mlp.fc2")]
            if i == 0:
                pairs += [
                    ("attn.to_add_out", "context", "attn.proj"),
                    ("norm1_context.linear", "context", "adaLN_modulation.1"),
                ]
                pairs += [("ff_context.net.0.proj", "context", "mlp.fc1"), ("ff_context.net.2", "context", "mlp.fc2")]
            for new, block, old in pairs:
                found[f"{theirs}.{block}_block.{old}.{end}"] = own[f"{ours}.{new}.{end}"]
        last = "joint_blocks.1.context_block.adaLN_modulation.1"
        found[f"{last}.{end}"] = _swapped(own[f"transformer_blocks.1.norm1_context.linear.{end}"])
    return _cloned(found)


def stable_diffusion(unet: Any, vae: Any, encoder: Any) -> Tensors:
    """A whole Stable Diffusion as its authors store it."""
    found = {}
    for key, tensor in unet.state_dict().items():
        is_resnet = "resnets" in key
        name = _renamed(_renamed(key, _RESNET) if is_resnet else key, _UNET)
        found[f"model.diffusion_model.{name}"] = tensor
    for key, tensor in vae.state_dict().items():
        is_conv = re.search(r"to_(q|k|v|out\.0)\.weight", key) is not None
        found[f"first_stage_model.{_renamed(key, _VAE)}"] = tensor[:, :, None, None] if is_conv else tensor
    for key, tensor in encoder.state_dict().items():
        found[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    return _cloned(found)


def open_clip(encoder: Any, layers: int) -> Tensors:
    """The second text encoder of Stable Diffusion XL as its authors store it: queries, keys and values in one."""
    own = {key.removeprefix("text_model."): tensor for key, tensor in encoder.state_dict().items()}
    found = {
        "positional_embedding": own["embeddings.position_embedding.weight"],
        "token_embedding.weight": own["embeddings.token_embedding.weight"],
        "text_projection": own["text_projection.weight"].T,
    }
    for end in ("weight", "bias"):
        found[f"ln_final.{end}"] = own[f"final_layer_norm.{end}"]
        for i in range(layers):
            ours, theirs = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            parts = [own[f"{ours}.self_attn.{part}_proj.{end}"] for part in "qkv"]
            found[f"{theirs}.attn.in_proj_{end}"] = torch.cat(parts)
            for new, old in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("self_attn.out_proj", "attn.out_proj")):  # fmt: skip
                found[f"{theirs}.{old}.{end}"] = own[f"{ours}.{new}.{end}"]
    return _cloned({f"conditioner.embedders.1.model.{key}": tensor for key, tensor in found.items()})


def sd_pipeline(folder: Path) -> tuple[Any, Any, Any]:
    """Write the configs of a tiny Stable Diffusion pipeline, and no weights; its three models."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=50, max_position_embeddings=12, **size, **TOKENS))
    for name, model in (("unet", unet), ("vae", vae)):
        model.save_config(folder / name)
    encoder.config.save_pretrained(folder / "text_encoder")
    diffusers.PNDMScheduler(steps_offset=1, skip_prk_steps=True).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return unet, vae, encoder


def _swapped(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(reversed(tensor.chunk(2))))


def _renamed(key: str, table: dict[str, str]) -> str:
    for new, old in table.items():
        key = key.replace(new, old)
    return key


def _cloned(tensors: Tensors) -> Tensors:
    return {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}

"""How the tiny teacher in `tiny_wan/` was made: a complete Wan2.2 pipeline, trained from nothing on drawn clips.

    python -m tiedquiet.distill.tiny_teacher --output_dir tiny_wan      # one GPU, under 15 minutes

First the VAE learns to reproduce the clips of `clips.py`, then both experts and the text encoder learn together to
match the flow-matching velocity of its latents, each expert on its side of the boundary. The folder has the form of the
published Wan2.2 checkpoints: of the text encoder only `shared.weight` is stored, and `tie_word_embeddings` is false.
Nothing is written unless the samples of the finished pipeline adhere to their prompts.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import trange
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from tiedquiet.distill.clips import FRAMES, PROMPTS, SIZE, adhering, draw
from tiedquiet.distill.teacher import Expert

BOUNDARY, SHIFT = 0.875, 3.0  # as Wan2.2-T2V-A14B, and its shift for small frames
TEXT_LENGTHS = (16, 512)  # short for speed, and WanPipeline's default
ADHERENCE = 0.9  # what the finished teacher must reach


def build() -> WanPipeline:
    """The whole pipeline, new: 0.5 M parameters in the VAE, 1 M in each expert, 0.1 M in the text encoder."""
    words = sorted({f"▁{word}" for prompt in PROMPTS for word in prompt.split()})
    tokenizer = T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -9.0), *((word, -1.0) for word in words)],
        extra_ids=0,
    )
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=32, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)
    )
    vae = AutoencoderKLWan(
        base_dim=12, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    experts = [
        WanTransformer3DModel(
            num_attention_heads=3, attention_head_dim=32, ffn_dim=192, num_layers=8, text_dim=64, rope_max_seq_len=64
        )
        for _ in range(2)
    ]
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, num_train_timesteps=1000
    )
    return WanPipeline(tokenizer, text_encoder, vae, scheduler, *experts, boundary_ratio=BOUNDARY)


def train_vae(vae: AutoencoderKLWan, steps: int, batch: int, generator: torch.Generator) -> None:
    """Reproduce drawn clips. Lit pixels count 13 times: without that, black is the first minimum it falls into.

    It is shown more sizes and places than the experts are: with theirs alone it stays blurred three times as long.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    bar = trange(steps, desc="VAE", mininterval=5)
    for step in bar:
        which = torch.randint(len(PROMPTS), (batch,), generator=generator, device=generator.device)
        clips = draw(which, generator, smallest=9, spread=8)
        latents = vae.encode(clips).latent_dist
        weight = 1 + 12 * (clips.amax(1, keepdim=True) > -1)
        error = (weight * (vae.decode(latents.sample(generator)).sample - clips).abs()).mean()
        loss = error + 1e-5 * latents.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")


@torch.no_grad()
def reconstruction(vae: AutoencoderKLWan, generator: torch.Generator) -> float:
    """The share of prompts whose clip still reads as it after encoding and decoding."""
    clips = draw(torch.arange(len(PROMPTS), device=generator.device), generator)
    again = vae.decode(vae.encode(clips).latent_dist.mode()).sample
    return adhering((again.transpose(1, 2) + 1) / 2, PROMPTS) / len(PROMPTS)


@torch.no_grad()
def encode(vae: AutoencoderKLWan, each: int, generator: torch.Generator) -> Tensor:
    """(prompts, each, 16, 3, 8, 8) normalised latents of drawn clips; the VAE's config gets mean and deviation."""
    latents = torch.stack(
        [
            vae.encode(draw(torch.arange(len(PROMPTS), device=generator.device), generator)).latent_dist.mode()
            for _ in trange(each, desc="latents", mininterval=5)
        ],
        dim=1,
    )
    deviation, mean = torch.std_mean(latents, dim=(0, 1, 3, 4, 5))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    return (latents - mean.view(-1, 1, 1, 1)) / deviation.view(-1, 1, 1, 1)


class Velocity(torch.nn.Module):
    """An expert as a function of tensors alone, which is what a CUDA graph can record."""

    def __init__(self, expert: WanTransformer3DModel) -> None:
        super().__init__()
        self.expert = expert

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The velocity, shaped as `x`: (batch, channels, frames, height, width)."""
        velocity: Tensor = self.expert(x, timestep, text, return_dict=False)[0]
        return velocity


def graphed(expert: WanTransformer3DModel, x: Tensor, text_length: int) -> torch.nn.Module:
    """The expert, on a GPU as a CUDA graph: launching its small kernels one by one takes five times as long."""
    velocity: Any = Velocity(expert)
    if x.is_cuda:  # pragma: no cover - needs a GPU
        text = torch.randn(len(x), text_length, expert.config.text_dim, device=x.device, requires_grad=True)
        example = (x, 1000 * torch.rand(len(x), device=x.device), text)
        velocity = torch.cuda.make_graphed_callables(velocity, example)
    return velocity  # type: ignore[no-any-return]


def train_experts(pipe: WanPipeline, bank: Tensor, steps: int, batch: int, generator: torch.Generator) -> None:
    """Match the velocity of flow matching, x = (1 - sigma) x0 + sigma noise, v = noise - x0 (arXiv:2210.02747)."""
    device = generator.device
    experts = [pipe.transformer, pipe.transformer_2]
    learnt = torch.nn.ModuleList([pipe.text_encoder, *experts])
    optimizer = torch.optim.AdamW(learnt.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    average = EMAModel(learnt.parameters(), decay=0.998, foreach=True)
    tokens = pipe.tokenizer([*PROMPTS, ""], padding=True, return_tensors="pt").to(device)
    example = torch.randn(batch, *bank.shape[2:], device=device)
    velocities = {length: [graphed(expert, example, length) for expert in experts] for length in TEXT_LENGTHS}
    sides = [
        Expert("transformer", 1000 * BOUNDARY, 1000, 1000, SHIFT),
        Expert("transformer_2", 0, 1000 * BOUNDARY, 1000, SHIFT),
    ]
    bar = trange(steps, desc="experts", mininterval=5)
    for step in bar:
        text = pipe.text_encoder(**tokens).last_hidden_state * tokens.attention_mask[..., None]
        length = TEXT_LENGTHS[step % 4 == 0]
        text = torch.nn.functional.pad(text, (0, 0, 0, length - text.shape[1]))
        total = torch.zeros((), device=device)
        for velocity, side in zip(velocities[length], sides, strict=True):
            which, clip = (torch.randint(n, (batch,), generator=generator, device=device) for n in bank.shape[:2])
            x0 = bank[which, clip]
            # One prompt in ten is empty, so that classifier-free guidance has something to guide away from.
            empty = torch.rand(batch, generator=generator, device=device) < 0.1
            sigma = side.sigmas(torch.rand(batch, generator=generator, device=device))[:, None, None, None, None]
            noise = torch.randn(x0.shape, generator=generator, device=device)
            words = text[torch.where(empty, len(PROMPTS), which)]
            predicted = velocity((1 - sigma) * x0 + sigma * noise, 1000 * sigma.flatten(), words)
            total = total + (predicted - (noise - x0)).square().mean()
        torch.autograd.backward(total)
        torch.nn.utils.clip_grad_norm_(learnt.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(learnt.parameters())
        if step % 100 == 0:
            bar.set_postfix(loss=f"{total.item():.4f}")
    average.copy_to(learnt.parameters())


def adherence(pipe: WanPipeline, seeds: int = 2, **options: int) -> float:
    """The share of prompts that the pipeline's clips read back as, over all prompts and some seeds."""
    right = 0
    for seed in range(seeds):
        clips = pipe(
            PROMPTS,
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            **options,
        ).frames
        right += adhering(clips, PROMPTS)
    return right / (seeds * len(PROMPTS))


def save(pipe: WanPipeline, folder: Path) -> None:
    """Write the folder in Wan's form: float16 except for the text encoder, whose tie its config denies."""
    pipe.save_pretrained(folder)
    for file in [*folder.glob("transformer*/*.safetensors"), *folder.glob("vae/*.safetensors")]:
        save_file({key: value.half() for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    weights, config = folder / "text_encoder/model.safetensors", folder / "text_encoder/config.json"
    stored = {key: value for key, value in load_file(weights).items() if key != "encoder.embed_tokens.weight"}
    stored["shared.weight"] = pipe.text_encoder.shared.weight.detach().cpu()
    save_file(stored, weights, metadata={"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}, indent=2) + "\n")


def main() -> None:
    """Train, judge, and only then write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).with_name("tiny_wan"))
    parser.add_argument("--vae_steps", type=int, default=1400)
    parser.add_argument("--vae_batch", type=int, default=32)
    parser.add_argument("--expert_steps", type=int, default=3500)
    parser.add_argument("--expert_batch", type=int, default=256)
    parser.add_argument("--clips", type=int, default=128, help="clips drawn for each prompt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True  # the VAE convolves few channels over many pixels
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    pipe = build().to(device)
    train_vae(pipe.vae, args.vae_steps, args.vae_batch, generator)
    read = reconstruction(pipe.vae, generator)
    print(f"the VAE's clips read as their prompts: {read:.1%}")
    if read < ADHERENCE:
        sys.exit(f"tiny_teacher: the VAE's {read:.1%} is under {ADHERENCE:.0%}; nothing was written")
    bank = encode(pipe.vae, args.clips, generator)
    train_experts(pipe, bank, args.expert_steps, args.expert_batch, generator)
    with tempfile.TemporaryDirectory(dir=args.output_dir.parent) as beside:
        made = Path(beside) / "pipeline"
        save(pipe, made)
        reached = adherence(WanPipeline.from_pretrained(made).to(device), num_inference_steps=12, guidance_scale=1)
        print(f"prompt adherence: {reached:.1%}")
        if reached < ADHERENCE:
            sys.exit(f"tiny_teacher: adherence {reached:.1%} is under {ADHERENCE:.0%}; nothing was written")
        args.output_dir.mkdir(exist_ok=True)
        args.output_dir.rename(Path(beside) / "before")
        made.rename(args.output_dir)


if __name__ == "__main__":
    main()

"""How the tiny teacher in `wan/` was made: a complete Wan2.2 pipeline, trained from scratch on drawn clips.

    python -m tiedquiet.distill.tiny.recipe --output_dir tiny_wan      # one GPU, 5 minutes on an H100

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

from tiedquiet.distill.pipeline import Expert, few_steps
from tiedquiet.distill.tiny.clips import FRAMES, PROMPTS, SIZE, adhering, draw

BOUNDARY = 0.875  # as Wan2.2-T2V-A14B
TRAINING_SHIFT, SHIFT = 3.0, 5.0  # of the noise schedule: where most is learnt, where most steps are taken
TEXT_LENGTH, PIPELINE_TEXT_LENGTH = 16, 512  # short for speed; WanPipeline's default
LATENTS = (16, 2, 8, 8)  # channels, frames, height, width
WRONG, EMPTY = 0.2, 0.1  # of the captions
STEPS, GUIDANCE = 24, 3.0  # how the finished teacher is sampled
ADHERENCE = 0.95  # what it must reach then
BATCH = 8  # of clips that are decoded at once: more is slower on a CPU


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
            num_attention_heads=3, attention_head_dim=32, ffn_dim=192, num_layers=6, text_dim=64, rope_max_seq_len=64
        )
        for _ in range(2)
    ]
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, num_train_timesteps=1000
    )
    return WanPipeline(tokenizer, text_encoder, vae, scheduler, *experts, boundary_ratio=BOUNDARY)


class Autoencoder(torch.nn.Module):
    """The VAE as a function of tensors alone, which is what a CUDA graph can record."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae
        self.frames: list[Tensor] = []
        vae.decoder.register_forward_hook(lambda decoder, inputs, frames: self.frames.append(frames))

    def forward(self, clips: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The clips drawn again, and mean and logarithmic variance of their latents, which are as large as `noise`."""
        self.frames = []
        latents = self.vae.encode(clips).latent_dist
        self.vae.decode(latents.mean + latents.std * noise)
        # Before they are clamped: a colour that leaves the range would get no gradient that brings it back.
        return torch.cat(self.frames, 2), latents.mean, latents.logvar


def graphed(function: torch.nn.Module, *example: Tensor) -> Any:
    """The function, on a GPU as a CUDA graph: launching its small kernels one by one takes several times as long."""
    if not example[0].is_cuda:
        return function
    return torch.cuda.make_graphed_callables(function, example)  # pragma: no cover - needs a GPU


def train_vae(vae: AutoencoderKLWan, steps: int, batch: int, generator: torch.Generator) -> None:
    """Reproduce drawn clips. Lit pixels count 13 times: without that, black is the first minimum it falls into."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)

    def inputs() -> tuple[Tensor, Tensor]:
        which = torch.randint(len(PROMPTS), (batch,), generator=generator, device=generator.device)
        noise = torch.randn(batch, *LATENTS, generator=generator, device=generator.device)
        return draw(which, generator), noise

    autoencoder = graphed(Autoencoder(vae), *inputs())
    bar = trange(steps, desc="VAE", mininterval=5)
    for step in bar:
        clips, noise = inputs()
        again, mean, logvar = autoencoder(clips, noise)
        weight = 1 + 12 * (clips.amax(1, keepdim=True) > -1)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        loss = (weight * (again - clips).abs()).mean() + 1e-5 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")


@torch.no_grad()
def reconstruction(vae: AutoencoderKLWan, generator: torch.Generator, draws: int = 3) -> float:
    """The share of drawn clips that still read as their prompt after encoding and decoding."""
    right = 0
    for _ in range(draws):
        for which in torch.split(torch.arange(len(PROMPTS), device=generator.device), BATCH):
            again = vae.decode(vae.encode(draw(which, generator)).latent_dist.mode()).sample
            right += adhering((again.transpose(1, 2) + 1) / 2, [PROMPTS[n] for n in which])
    return right / (draws * len(PROMPTS))


@torch.no_grad()
def encode(vae: AutoencoderKLWan, each: int, generator: torch.Generator) -> Tensor:
    """(prompts, each, *LATENTS) normalised latents of drawn clips; the VAE's config gets mean and deviation."""
    latents = []
    for _ in trange(each, desc="latents", mininterval=5):
        latents.append(
            vae.encode(draw(torch.arange(len(PROMPTS), device=generator.device), generator)).latent_dist.mode()
        )
    bank = torch.stack(latents, dim=1)
    deviation, mean = torch.std_mean(bank, dim=(0, 1, 3, 4, 5))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    return (bank - mean.view(-1, 1, 1, 1)) / deviation.view(-1, 1, 1, 1)


class Velocity(torch.nn.Module):
    """An expert as a function of tensors alone."""

    def __init__(self, expert: WanTransformer3DModel) -> None:
        super().__init__()
        self.expert = expert

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The velocity, shaped as `x`: (batch, channels, frames, height, width)."""
        velocity: Tensor = self.expert(x, timestep, text, return_dict=False)[0]
        return velocity


def train_experts(pipe: WanPipeline, bank: Tensor, steps: int, batch: int, generator: torch.Generator) -> None:
    """Match the velocity of flow matching, x = (1 - sigma) x0 + sigma noise, v = noise - x0 (arXiv:2210.02747).

    Some captions are wrong, as captions on the web are, and some are empty: so the teacher needs
    classifier-free guidance (arXiv:2207.12598) to draw what it is told, as Wan does.
    """
    device = generator.device
    experts = [pipe.transformer, pipe.transformer_2]
    learnt = torch.nn.ModuleList([pipe.text_encoder, *experts])
    optimizer = torch.optim.AdamW(learnt.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    average = EMAModel(learnt.parameters(), decay=0.998, foreach=True)
    tokens = pipe.tokenizer([*PROMPTS, ""], padding=True, return_tensors="pt").to(device)
    velocities = {}
    for length, size in (TEXT_LENGTH, batch), (PIPELINE_TEXT_LENGTH, max(1, batch // 4)):
        text = torch.randn(size, length, pipe.transformer.config.text_dim, device=device, requires_grad=True)
        example = torch.randn(size, *LATENTS, device=device), 1000 * torch.rand(size, device=device), text
        velocities[length] = size, [graphed(Velocity(expert), *example) for expert in experts]
    sides = [
        Expert("transformer", 1000 * BOUNDARY, 1000, 1000, TRAINING_SHIFT),
        Expert("transformer_2", 0, 1000 * BOUNDARY, 1000, TRAINING_SHIFT),
    ]

    def chosen(count: int, size: int) -> Tensor:
        return torch.randint(count, (size,), generator=generator, device=device)

    def share(part: float, size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device) < part

    bar = trange(steps, desc="experts", mininterval=5)
    for step in bar:
        length = TEXT_LENGTH if step % 4 else PIPELINE_TEXT_LENGTH
        text = pipe.text_encoder(**tokens).last_hidden_state * tokens.attention_mask[..., None]
        text = torch.nn.functional.pad(text, (0, 0, 0, length - text.shape[1]))
        size, both = velocities[length]
        total = torch.zeros((), device=device)
        for velocity, side in zip(both, sides, strict=True):
            which = chosen(len(PROMPTS), size)
            x0 = bank[which, chosen(bank.shape[1], size)]
            caption = torch.where(share(WRONG, size), chosen(len(PROMPTS), size), which)
            caption = torch.where(share(EMPTY, size), len(PROMPTS), caption)
            sigma = side.sigmas(torch.rand(size, generator=generator, device=device))[:, None, None, None, None]
            noise = torch.randn(x0.shape, generator=generator, device=device)
            predicted = velocity((1 - sigma) * x0 + sigma * noise, 1000 * sigma.flatten(), text[caption])
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


def adherence(pipe: WanPipeline, steps: int, guidance: float, seeds: int = 4) -> float:
    """The share of a pipeline's clips that read back as their prompts, over all prompts and some seeds."""
    pipe.set_progress_bar_config(disable=True)
    right = 0
    for seed in range(seeds):
        for start in range(0, len(PROMPTS), BATCH):
            prompts = PROMPTS[start : start + BATCH]
            clips = pipe(
                prompts,
                height=SIZE,
                width=SIZE,
                num_frames=FRAMES,
                num_inference_steps=steps,
                guidance_scale=guidance,
                max_sequence_length=TEXT_LENGTH,
                generator=torch.Generator().manual_seed(1000 * seed + start),
                output_type="pt",
            ).frames
            right += adhering(clips, prompts)
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
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).with_name("wan"))
    parser.add_argument("--vae_steps", type=int, default=1600)
    parser.add_argument("--vae_batch", type=int, default=32)
    parser.add_argument("--expert_steps", type=int, default=6000)
    parser.add_argument("--expert_batch", type=int, default=256)
    parser.add_argument("--clips", type=int, default=256, help="clips drawn for each prompt")
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
        sys.exit(f"recipe: the VAE's {read:.1%} is under {ADHERENCE:.0%}; nothing was written")
    bank = encode(pipe.vae, args.clips, generator)
    train_experts(pipe, bank, args.expert_steps, args.expert_batch, generator)
    with tempfile.TemporaryDirectory(dir=args.output_dir.parent) as beside:
        made = Path(beside) / "pipeline"
        save(pipe, made)
        finished = WanPipeline.from_pretrained(made).to(device)
        reached = adherence(finished, STEPS, GUIDANCE)
        print(f"adherence, {STEPS} steps: {reached:.1%} guided, {adherence(finished, STEPS, 1.0):.1%} not")
        if reached < ADHERENCE:
            sys.exit(f"recipe: adherence {reached:.1%} is under {ADHERENCE:.0%}; nothing was written")
        for steps in (4, 2, 1):
            finished.scheduler = few_steps(finished.scheduler.config, steps)
            print(f"adherence, {steps} Euler steps: {adherence(finished, steps, GUIDANCE):.1%} guided")
        args.output_dir.mkdir(exist_ok=True)
        args.output_dir.rename(Path(beside) / "before")
        made.rename(args.output_dir)


if __name__ == "__main__":
    main()

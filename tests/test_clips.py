"""The reader of generated clips, on clips whose truth is known because they were drawn."""

import pytest
import torch

from tiedquiet.distill.clips import COLOURS, DIRECTIONS, FRAMES, PROMPTS, SHAPES, SIZE, draw, read


def drawn(seed: int) -> torch.Tensor:
    return (draw(torch.arange(len(PROMPTS)), torch.Generator().manual_seed(seed)) + 1) / 2


def test_there_is_a_prompt_for_every_combination() -> None:
    assert len(set(PROMPTS)) == len(COLOURS) * len(SHAPES) * len(DIRECTIONS) == 48


def test_every_drawn_clip_reads_back_as_its_prompt() -> None:
    for seed in range(3):
        clips = drawn(seed)
        assert clips.shape == (48, 3, FRAMES, SIZE, SIZE)
        assert [read(clip) for clip in clips] == PROMPTS


def test_blur_and_noise_do_not_mislead() -> None:
    clips = torch.nn.functional.avg_pool3d(drawn(3), (1, 3, 3), 1, (0, 1, 1))
    clips += 0.05 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    assert [read(clip.clamp(0, 1)) for clip in clips] == PROMPTS


def test_stray_pixels_do_not_stretch_the_box() -> None:
    clip = drawn(4)[PROMPTS.index("a red square moving up")]
    clip[:, :, 0, 0] = clip[:, :, -1, -1] = 1.0
    assert read(clip) == "a red square moving up"


@pytest.mark.parametrize(
    "clip",
    [
        torch.zeros(3, FRAMES, SIZE, SIZE),
        torch.eye(SIZE).expand(3, FRAMES, SIZE, SIZE),  # lit, but no row with two pixels
        drawn(5)[0][:, :1].expand(-1, FRAMES, -1, -1),  # stands still
    ],
    ids=["dark", "scattered", "still"],
)
def test_what_shows_nothing_that_moves_is_not_guessed(clip: torch.Tensor) -> None:
    assert read(clip) is None


def test_what_is_read_is_what_changed() -> None:
    clip = drawn(6)[PROMPTS.index("a red circle moving left")]
    assert read(clip) == "a red circle moving left"
    assert read(clip.flip(1)) == "a red circle moving right"
    assert read(clip.transpose(-1, -2)) == "a red circle moving up"
    assert read(clip[[1, 0, 2]]) == "a green circle moving left"

from __future__ import annotations

import pytest
import torch

from lightning_entropy.functional import hide_and_seek


def test_patches_are_hidden_as_wholes() -> None:
    images = torch.rand(5, 3, 12, 20) + 1
    out = hide_and_seek(
        images, grid=(3, 4), fill=torch.tensor([0.1, 0.2, 0.3]), generator=torch.Generator().manual_seed(0)
    )
    counts = set()
    for image, given in zip(out, images):
        hidden = 0
        for row in range(3):
            for column in range(4):
                part = (slice(None), slice(4 * row, 4 * row + 4), slice(5 * column, 5 * column + 5))
                kept = torch.equal(image[part], given[part])
                filled = torch.equal(image[part], torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1).expand(3, 4, 5))
                assert kept != filled
                hidden += filled
        counts.add(hidden)
    assert len(counts) > 1  # each image by itself


def test_sides_that_the_grid_does_not_divide() -> None:
    out = hide_and_seek(torch.arange(1.0, 8).view(1, 1, 1, 7), grid=(1, 3), generator=torch.Generator().manual_seed(3))
    widths = [3, 2, 2]  # of patches that differ by a pixel
    kept = [group.ne(0) for group in out.flatten().split(widths)]
    assert all(bool(k.all()) or not bool(k.any()) for k in kept)


def test_probability_and_seed() -> None:
    images = torch.ones(200, 1, 8, 8)
    first = hide_and_seek(images, p=0.3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, hide_and_seek(images, p=0.3, generator=torch.Generator().manual_seed(1)))
    # 3,200 patches: a standard deviation is 0.008
    assert abs((first == 0).float().mean().item() - 0.3) < 0.04
    assert torch.equal(hide_and_seek(images, p=0.0), images)
    assert not hide_and_seek(images, p=1.0).any()
    assert images.eq(1).all()
    assert hide_and_seek(images.half(), fill=0.5).dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1.5}, r"p must be in \[0, 1\], got 1.5"),
        ({"grid": 9}, "grid must be from 1 to the image's 8 x 8, got 9 x 9"),
        ({"grid": (0, 2)}, "got 0 x 2"),
    ],
)
def test_what_it_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hide_and_seek(torch.ones(1, 1, 8, 8), **options)
    with pytest.raises(ValueError, match="images must be"):
        hide_and_seek(torch.ones(8, 8))

"""Pictures of samples."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vkd_gen.files import whole_file
from vkd_gen.text import printable


def sample_grid(rows: Mapping[str, Tensor], columns: int = 16, least_side: int = 48) -> Image.Image:
    """Images on one sheet: a titled band per entry, small images enlarged without smoothing.

    Args:
        rows: title -> images, uint8, `[images, C, H, W]`; equal positions are meant to share a seed.
        columns: images per line.
        least_side: side in pixels that smaller images are enlarged to.
    """
    gap, band = 2, 18
    sides = [images.shape[-1] for images in rows.values()]
    tile_side = max(side * max(1, -(-least_side // side)) for side in sides)
    cell = tile_side + gap
    lines = {title: -(-len(images) // columns) for title, images in rows.items()}
    columns = min(columns, max(len(images) for images in rows.values()))
    height = sum(band + count * cell for count in lines.values()) + gap
    sheet = Image.new("RGB", (columns * cell + gap, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for title, images in rows.items():
        draw.text((gap + 1, top + 3), printable(title), fill="black")
        top += band
        for number, image in enumerate(images):
            pixels = image.expand(3, -1, -1) if image.shape[0] == 1 else image
            tile = Image.fromarray(np.asarray(pixels.permute(1, 2, 0).contiguous(), dtype=np.uint8))
            tile = tile.resize((tile_side, tile_side), Image.Resampling.NEAREST)
            sheet.paste(tile, (gap + number % columns * cell, top + number // columns * cell))
        top += lines[title] * cell
    return sheet


def save_sample_grid(rows: Mapping[str, Tensor], path: Path) -> None:
    """Save a `sample_grid` as a PNG."""
    with whole_file(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        sample_grid(rows).save(temporary)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)

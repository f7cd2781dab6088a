"""Images as files: numbered PNGs, or one .npz, with what is known of their making beside them."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from vkd_gen.evaluation.sources import ImageSource, own_blocks
from vkd_gen.files import whole_file
from vkd_gen.text import printable


def save_images(images: Mapping[str, UInt8[Tensor, "images channels height width"]], path: Path) -> None:
    """Write named sets of images as an .npz, an array `[images, H, W, C]` each."""
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in images.items():
            with archive.open(f"{printable(name)}.npy", "w") as file:
                np.lib.format.write_array(file, value.permute(0, 2, 3, 1).contiguous().numpy())


def png_name(number: int) -> str:
    """The file of image `number`."""
    return f"{number:06d}.png"


def make_pngs(source: ImageSource, folder: Path, batch_size: int) -> None:
    """Write each image as a PNG of its number, unless it is there; processes share the work.

    Each is computed in the same company, whatever is there of its batch.
    """
    for block in own_blocks(source.count, batch_size, "images"):
        files = [folder / png_name(number) for number in block]
        if not all(file.exists() for file in files):
            for file, image in zip(files, source.read(block), strict=True):
                if file.exists():
                    continue
                pixels = image.permute(1, 2, 0).numpy()
                with whole_file(file) as temporary:
                    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(temporary)
    PartialState().wait_for_everyone()


def write_captions(folder: Path, prompts: Sequence[str]) -> None:
    """Write what each PNG is of, as datasets' imagefolder reads it, so that a folder can be trained on."""
    with whole_file(folder / "metadata.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(prompts):
            file.write(json.dumps({"file_name": png_name(number), "text": prompt}) + "\n")


def pack_pngs(folder: Path, numbers: Sequence[int], path: Path) -> None:
    """Put PNGs into one array `arr_0`, uint8, `[images, H, W, C]`, as evaluators of other projects read it."""
    stacked = np.stack([np.asarray(Image.open(folder / png_name(number))) for number in numbers])
    with whole_file(path) as temporary:
        np.savez(temporary, arr_0=stacked if stacked.ndim == 4 else stacked[..., None])

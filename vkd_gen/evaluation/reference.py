"""What samples are compared to: images whose features are remembered on disk, or saved statistics."""

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vkd_gen.choices import OnBadImage
from vkd_gen.data.embedded import DIGITS
from vkd_gen.data.sources import load_images
from vkd_gen.evaluation.extractors import Extractor
from vkd_gen.evaluation.metrics import Statistics
from vkd_gen.evaluation.sources import ImageSource, content_hash, extract_features, from_array, from_images
from vkd_gen.files import cache_folder
from vkd_gen.loading import read_tensors
from vkd_gen.text import reason

logger = logging.getLogger(__name__)


def open_reference(
    name: str,
    size: int,
    *,
    held_out_fraction: float | None = None,
    image_column: str | None = None,
    on_bad_image: OnBadImage = "refuse",
) -> tuple[ImageSource | Statistics, ImageSource | None]:
    """What a reference on the command line stands for: images or statistics, and held-out images where there are some.

    `size` is that of the sources' images, in pixels; for the rest see `ScoreConfig` in eval/score.py.

    Raises:
        ValueError: in one line, for what is not there, damaged or of another size.
    """
    path = Path(name)
    if path.suffix != ".npz":
        fraction = held_out_fraction
        if fraction is None:
            fraction = 1 / 6 if name in DIGITS else 0
        images, held_out = load_images(
            name,
            resolution=size,
            channels=3,
            held_out_fraction=fraction,
            image_column=image_column,
            on_bad_image=on_bad_image,
        )
        return from_images("reference", images), from_images("held-out images", held_out) if len(held_out) else None
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if held_out_fraction:
        raise ValueError("--held_out_fraction is for data sets; an .npz reference is taken whole")
    if _holds_statistics(path):
        return load_statistics_file(name), None
    source = from_array(name)
    if source.size != size:
        held = f"images of {source.size} x {source.size} pixels"
        raise ValueError(f"the reference {path} holds {held}, the sources of {size} x {size}")
    return source, None


def _holds_statistics(path: Path) -> bool:
    """Whether an .npz holds statistics and not images."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return bool({"mu", "sigma"} & set(file.files))
    except Exception:  # what is damaged is neither; whoever reads it says so
        return False


def load_statistics_file(path: str) -> Statistics:
    """The entries `mu` and `sigma` of an .npz, as pytorch-fid writes them.

    Raises:
        ValueError: if the file holds no such statistics.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = torch.from_numpy(file["mu"]), torch.from_numpy(file["sigma"])
    except Exception as error:  # a zip file's, numpy's and the system's errors
        raise ValueError(f"cannot read statistics from {path}: {reason(error)}") from error
    if not all(part.is_floating_point() and part.isfinite().all() for part in (mean, covariance)):
        raise ValueError(f"the statistics in {path} are not finite real numbers")
    if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{path} holds mu {list(mean.shape)} and sigma {list(covariance.shape)}, which do not fit")
    tolerance = 1e-3 * float(covariance.abs().max())
    if not torch.allclose(covariance, covariance.T, rtol=0, atol=tolerance) or (covariance.diagonal() < 0).any():
        raise ValueError(f"sigma in {path} is no covariance: it is not symmetric, or has variances below 0")
    return Statistics(mean, covariance)


def cached_features(source: ImageSource, extractor: Extractor, batch_size: int) -> tuple[dict[str, Tensor], str]:
    """Features by layer of all images, and the hash of their pixels.

    From disk if the same images went through the same weights before; else computed, and kept there.
    """
    state = PartialState()
    pixels = content_hash(source)
    layers = sorted(set(extractor.layers.values()))
    key = json.dumps([pixels, extractor.name, extractor.weights_hash, layers])
    path = cache_folder("references") / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    cached = _read_cache(path, key)
    # All processes go the same way, also if one of them cannot read the file.
    everywhere = torch.tensor([cached is not None], dtype=torch.int32, device=state.device)
    if state.num_processes > 1:
        everywhere = gather(everywhere)
    if cached is not None and everywhere.all():
        return cached, pixels
    features = extract_features(source, extractor, batch_size=batch_size, progress=f"reference {source.name}").layers
    if state.is_main_process:
        _write_cache(path, features, key)
    state.wait_for_everyone()
    return features, pixels


def _read_cache(path: Path, key: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return read_tensors(path)
    except (OSError, SafetensorError, ValueError):
        pass
    return None


def _write_cache(path: Path, features: dict[str, Tensor], key: str) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in features.items()}, temporary, metadata={"key": key})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        logger.warning("note: the features of the reference are not kept for the next time: %s", error)
        with contextlib.suppress(OSError):
            temporary.unlink()

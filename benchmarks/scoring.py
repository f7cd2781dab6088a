"""Scoring samples: one pass in memory against PNGs on disk and a tool per score, in one run.

python benchmarks/scoring.py --num_images 2000
"""

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_fidelity
from accelerate import PartialState
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from vkd_gen.cli import run_command
from vkd_gen.data.sources import load_images
from vkd_gen.evaluation.extractors import Extractor, load_extractor
from vkd_gen.evaluation.options import ScoreOptions
from vkd_gen.evaluation.scorer import Scorer
from vkd_gen.evaluation.sources import from_tensor
from vkd_gen.provenance import environment, write_json
from vkd_gen.training.options import default_cifar10


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """What to time. The samples are images of a data set: how samples are made is the same in both ways."""

    dataset: str = default_cifar10()
    """Data set; its test split stands for the samples, its training split is the reference."""
    resolution: int = 32
    """Side of the images, pixels."""
    num_images: int = 2000
    """Samples, and images of the reference."""
    extractor: str = "efficientnet-lite0"
    """Network; see eval/score.py."""
    batch_size: int = 64
    """Images at a time."""
    output: str = "benchmarks/results/scoring.json"
    """File for the numbers."""


class Bridge(FeatureExtractorBase):
    """One of our extractors as torch-fidelity takes them, so that both ways compute with the same network."""

    extractor: Extractor

    def __init__(self, name: str, features_list: list[str], **_options: Any):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Its layers."""
        return ("features", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The layer of each metric."""
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        """It is not."""
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The asked for layers of a batch."""
        layers = self.extractor(images)
        return tuple(layers[name] for name in self.features_list)


def peers_way(samples: Tensor, reference: Path, folder: Path, name: str, batch_size: int) -> dict[str, float]:
    """Write PNGs; read them for the Inception score; read both sides for FID. The other scores are left out."""
    save_pngs(samples, folder)
    shared = {"feature_extractor": name, "cuda": False, "batch_size": batch_size, "cache": False, "verbose": False}
    scores = torch_fidelity.calculate_metrics(input1=str(folder), isc=True, **shared)
    return scores | torch_fidelity.calculate_metrics(input1=str(folder), input2=str(reference), fid=True, **shared)


def save_pngs(images: Tensor, folder: Path) -> None:
    """Image i as a PNG."""
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:06d}.png")


def main(config: ScoringConfig) -> None:
    """Time both ways on the same images, and see that they agree."""
    training, test = load_images(config.dataset, resolution=config.resolution, channels=3)
    device = PartialState().device
    Bridge.extractor = load_extractor(config.extractor)
    Bridge.extractor.network.to(device)
    if config.num_images > min(len(training), len(test)):
        raise ValueError(f"--num_images must be at most {min(len(training), len(test))} with {config.dataset}")
    samples, reference = (part.pixels(range(config.num_images)) for part in (test, training))
    FEATURE_EXTRACTORS_REGISTRY["bridge"] = Bridge
    options = ScoreOptions(extractor=config.extractor, kid_subset_size=min(1000, config.num_images))
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["VKD_GEN_CACHE"] = str(folder / "cache")
        save_pngs(reference, folder / "reference")
        Bridge.extractor(samples[: config.batch_size])  # allocations are not counted on either side
        start = time.perf_counter()
        scorer = Scorer(
            options, from_tensor("reference", reference), batch_size=config.batch_size, num_samples=config.num_images
        )
        seconds["reference, once"] = time.perf_counter() - start
        start = time.perf_counter()
        scorer = Scorer(
            options, from_tensor("reference", reference), batch_size=config.batch_size, num_samples=config.num_images
        )
        ours, _ = scorer(from_tensor("samples", samples))
        seconds["this package, all scores, reference kept"] = time.perf_counter() - start
        start = time.perf_counter()
        peers = peers_way(samples, folder / "reference", folder / "samples", "bridge", config.batch_size)
        seconds["PNGs, one tool for IS, one for FID"] = time.perf_counter() - start
        shutil.rmtree(folder / "samples")
    suffix = scorer.extractor.suffix
    pairs = {
        "fid": (ours[f"fid{suffix}"], peers["frechet_inception_distance"]),
        "inception_score": (ours[f"inception_score{suffix}"], peers["inception_score_mean"]),
    }
    for name, (value, expected) in pairs.items():
        if not np.isclose(value, expected, rtol=1e-6):
            raise ValueError(f"the two ways disagree on {name}: {value} and {expected}")
    ratio = seconds["this package, all scores, reference kept"] / seconds["PNGs, one tool for IS, one for FID"]
    table = Table("way", "seconds")
    for way, value in seconds.items():
        table.add_row(way, f"{value:.1f}")
    Console(width=100).print(table)
    print(f"ratio {ratio:.3f}; equal scores: {', '.join(f'{name} {value:.6g}' for name, (value, _) in pairs.items())}")
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    protocol = {"num_images": config.num_images, "batch_size": config.batch_size, "extractor": config.extractor}
    protocol |= {"threads": torch.get_num_threads(), "environment": environment()}
    write_json(output, {"seconds": seconds, "ratio": ratio, "scores": ours, "protocol": protocol})


if __name__ == "__main__":
    run_command(main, ScoringConfig, __doc__)

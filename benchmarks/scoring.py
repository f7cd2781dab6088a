"""Scoring samples: one pass in memory against PNGs on disk and a tool per score, in one run.

python benchmarks/scoring.py --num_images 2000
"""

import os
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
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from measuring import RESULTS, print_table, write_results
from vkd_gen.cli import run_command
from vkd_gen.data.sources import load_images
from vkd_gen.evaluation.extractors import Extractor, load_extractor
from vkd_gen.evaluation.options import ScoreOptions
from vkd_gen.evaluation.scorer import Scorer
from vkd_gen.evaluation.sources import from_tensor
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
    output: str = str(RESULTS / "scoring.json")
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
        """The layers that are asked for, of a batch."""
        layers = self.extractor(images)
        return tuple(layers[name] for name in self.features_list)


def peers_way(samples: Tensor, reference: Path, folder: Path, batch_size: int) -> tuple[float, float]:
    """FID and Inception score as repositories commonly get them: PNGs, one call for each score."""
    save_pngs(samples, folder)
    shared = {"feature_extractor": "bridge", "cuda": False, "batch_size": batch_size, "cache": False, "verbose": False}
    scores = torch_fidelity.calculate_metrics(input1=str(folder), isc=True, **shared)
    scores |= torch_fidelity.calculate_metrics(input1=str(folder), input2=str(reference), fid=True, **shared)
    return scores["frechet_inception_distance"], scores["inception_score_mean"]


def save_pngs(images: Tensor, folder: Path) -> None:
    """Image i as a PNG."""
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:06d}.png")


def main(config: ScoringConfig) -> None:
    """Time both ways on the same images, and check that they agree."""
    training, test = load_images(config.dataset, resolution=config.resolution, channels=3)
    if config.num_images > min(len(training), len(test)):
        raise ValueError(f"--num_images must be at most {min(len(training), len(test))} with {config.dataset}")
    Bridge.extractor = load_extractor(config.extractor)
    Bridge.extractor.network.to(PartialState().device)
    FEATURE_EXTRACTORS_REGISTRY["bridge"] = Bridge
    samples, reference = (part.pixels(range(config.num_images)) for part in (test, training))
    options = ScoreOptions(extractor=config.extractor, kid_subset_size=min(1000, config.num_images))

    def make_scorer() -> Scorer:
        source = from_tensor("reference", reference)
        return Scorer(options, source, batch_size=config.batch_size, num_samples=config.num_images)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["VKD_GEN_CACHE"] = str(folder / "cache")
        save_pngs(reference, folder / "reference")
        Bridge.extractor(samples[: config.batch_size])  # allocations are not counted on either side
        times = [time.perf_counter()]
        make_scorer()
        times.append(time.perf_counter())
        scorer = make_scorer()
        ours, _ = scorer(from_tensor("samples", samples))
        times.append(time.perf_counter())
        peers = peers_way(samples, folder / "reference", folder / "samples", config.batch_size)
        times.append(time.perf_counter())
    for name, expected in zip(("fid", "inception_score"), peers, strict=True):
        value = ours[f"{name}{scorer.extractor.suffix}"]
        if not np.isclose(value, expected, rtol=1e-6):
            raise ValueError(f"the two ways disagree on {name}: {value} and {expected}")
    ways = ("reference, once", "this package, all scores, reference kept", "PNGs, one tool for IS, one for FID")
    seconds = dict(zip(ways, np.diff(times).tolist(), strict=True))
    ratio = seconds[ways[1]] / seconds[ways[2]]
    print_table(("way", "seconds"), [(way, f"{value:.1f}") for way, value in seconds.items()])
    print(f"ratio {ratio:.3f}; equal FID {peers[0]:.6g} and Inception score {peers[1]:.6g}")
    write_results(
        Path(config.output),
        {"seconds": seconds, "ratio": ratio, "scores": ours},
        num_images=config.num_images,
        batch_size=config.batch_size,
        extractor=config.extractor,
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    run_command(main, ScoringConfig, __doc__)

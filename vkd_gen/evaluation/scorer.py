"""Scores of many sets of images against one reference, which is read once and remembered on disk."""

import contextlib
import hashlib
import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather
from diffusers import ModelMixin, SchedulerMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vkd_gen.data.images import Images
from vkd_gen.evaluation.extractors import Extractor, import_torch_fidelity, load_extractor
from vkd_gen.evaluation.labels import data_label
from vkd_gen.evaluation.metrics import (
    frechet_distance_to_statistics,
    memorization_scores,
    sample_scores,
)
from vkd_gen.evaluation.options import LEAST_IMAGES, ScoreOptions
from vkd_gen.evaluation.sources import (
    Features,
    ImageSource,
    content_hash,
    extract_features,
    from_images,
    from_model,
)
from vkd_gen.hub import read_tensors
from vkd_gen.models import Model

logger = logging.getLogger(__name__)


def note_foreign_features(extractor: Extractor, data: str) -> None:
    """Say it where samples of some data are scored by a small network that was trained on other data.

    Args:
        extractor: that scores.
        data: set that the samples are compared to.
    """
    trained_on = extractor.facts.get("dataset")
    if trained_on and data_label(data) != data_label(trained_on) and PartialState().is_main_process:
        logger.warning(
            "note: the features of %s were trained on %s, not on %s: they see no more in these images than what looks "
            "like %s, and their scores mean little elsewhere",
            extractor.facts.get("file", extractor.name),
            trained_on,
            data,
            trained_on,
        )


@dataclass(frozen=True)
class Reference:
    """What samples are compared to.

    Attributes:
        training: layer -> features of the images that models were trained on; empty for saved statistics.
        held_out: layer -> features of images that no model was trained on; None if there are none.
        statistics: saved mean and covariance, in place of features.
        protocol: what it is, for results.json.
    """

    training: dict[str, Tensor]
    held_out: dict[str, Tensor] | None
    statistics: tuple[Tensor, Tensor] | None
    protocol: dict[str, Any]


class Scorer:
    """Scores sets of images against one reference.

    Args:
        options: of the scores.
        reference: images that models were trained on, or statistics from `load_statistics_file`.
        held_out: images that no model was trained on; None leaves out what they are needed for.
        batch_size: images at a time and process in the extractor.
        num_samples: how many images the smallest source will have; by default `options.num_score_samples`.

    Raises:
        ValueError: in one line, for too few images, an extractor that cannot be had.
    """

    def __init__(
        self,
        options: ScoreOptions,
        reference: ImageSource | tuple[Tensor, Tensor],
        held_out: ImageSource | None = None,
        *,
        batch_size: int = 64,
        num_samples: int | None = None,
    ):
        import_torch_fidelity()
        self.options, self.batch_size = options, batch_size
        num_samples = options.num_score_samples if num_samples is None else num_samples
        with_kid = isinstance(reference, ImageSource)  # saved statistics give FID alone
        _check_count("the samples", num_samples, options, with_kid=with_kid)
        if isinstance(reference, ImageSource):
            _check_count("the reference", reference.count, options)
        self.extractor = load_extractor(options.extractor, options.extractor_weights)
        self.extractor.network.to(PartialState().device)
        if isinstance(reference, ImageSource):
            self.reference = self._load_reference(reference, held_out)
            width = self.reference.training[self.extractor.layers["fid"]].shape[1]
        else:
            self.reference = Reference({}, None, reference, {"reference": "saved mean and covariance"})
            width = len(reference[0])
            probe = self.extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[self.extractor.layers["fid"]]
            if probe.shape[1] != width:
                raise ValueError(
                    f"the saved statistics have {width} dimensions, the features of {self.extractor.name} "
                    f"{probe.shape[1]}: they were made with another network"
                )
        if num_samples <= width and PartialState().is_main_process:
            logger.warning(
                "note: a FID from %d images in %d dimensions is biased upwards; compare it with FIDs of equally many "
                "images alone, and read KID beside it",
                num_samples,
                width,
            )

    def _load_reference(self, training: ImageSource, held_out: ImageSource | None) -> Reference:
        protocol: dict[str, Any] = {"reference": dict(training.protocol)}
        features, protocol["reference_hash"] = cached_features(training, self.extractor, self.batch_size)
        others = None
        if held_out is not None and held_out.count:
            others, _ = cached_features(held_out, self.extractor, self.batch_size)
            protocol["held_out"] = (
                f"{held_out.count} images that were not trained on; fid_training, fid_held_out and nearer_to_training "
                f"compare to them and to equally many training images"
            )
        return Reference(features, others, None, protocol)

    @property
    def protocol(self) -> dict[str, Any]:
        """How every score of this object is taken."""
        return {
            "extractor": self.extractor.name,
            "extractor_weights_sha256": self.extractor.weights_hash,
            **{f"extractor_{name}": value for name, value in self.extractor.facts.items()},
            "kid": f"100 subsets of {self.options.kid_subset_size}",
            **self.reference.protocol,
        }

    def __call__(self, source: ImageSource, *, num_shown: int = 32) -> tuple[dict[str, float], Features]:
        """Score one set of images; every process gets the result.

        Args:
            source: of the images.
            num_shown: first images to return.

        Returns:
            Score -> value, see `sample_scores` and `memorization_scores`; and the features that they are taken from.
        """
        features = extract_features(
            source, self.extractor, batch_size=self.batch_size, num_shown=num_shown, progress=f"scoring {source.name}"
        )
        scores = [self.scores_of(features.layers)] if PartialState().is_main_process else [{}]
        broadcast_object_list(scores)
        return scores[0], features

    def score_model(
        self, name: str, model: Model, *, num_shown: int = 32
    ) -> tuple[dict[str, float], Features, ImageSource]:
        """Score a model's samples, image i from seed i.

        Args:
            name: of the model.
            model: on the device to compute on.
            num_shown: first samples to return.

        Returns:
            Scores, features, and where the samples came from.
        """
        source = from_model(
            name,
            model,
            count=self.options.num_score_samples,
            num_inference_steps=self.options.num_inference_steps,
        )
        return *self(source, num_shown=num_shown), source

    def score_unet(self, name: str, unet: ModelMixin, noise_scheduler: SchedulerMixin) -> tuple[Any, ...]:
        """`score_model` of a bare UNet."""
        return self.score_model(name, Model.of_unet(unet, noise_scheduler))

    def scores_of(self, features: dict[str, Tensor]) -> dict[str, float]:
        """Scores from features by layer."""
        reference, suffix, layer = self.reference, self.extractor.suffix, self.extractor.layers["fid"]
        if reference.statistics is not None:
            distance = frechet_distance_to_statistics(features[layer], *reference.statistics)
            if not math.isfinite(distance):
                raise ValueError(
                    "the FID to the saved statistics is not finite: are they of this extractor's features?"
                )
            return {f"fid{suffix}": distance}
        kid_subset_size = min(self.options.kid_subset_size, len(features[layer]))
        scores = sample_scores(features, reference.training, self.extractor, kid_subset_size=kid_subset_size)
        if reference.held_out is not None:
            others = reference.held_out
            count = min(len(others[layer]), len(reference.training[layer]))
            if count > 1:  # to equally many of both, so that they can be compared
                for name, rows in (("fid_training", reference.training[layer]), ("fid_held_out", others[layer])):
                    mean, covariance = _mean_and_covariance(rows[torch.arange(count) * len(rows) // count])
                    scores[name + suffix] = frechet_distance_to_statistics(features[layer], mean, covariance)
            near = memorization_scores(features[layer], reference.training[layer], others[layer])
            scores |= {name + suffix: value for name, value in near.items()}
        return scores

    def scores_of_held_out(self) -> dict[str, float]:
        """The held-out images scored as if they were samples: what no model should be expected to beat."""
        if self.reference.held_out is None or len(next(iter(self.reference.held_out.values()))) < LEAST_IMAGES:
            return {}
        kid_subset_size = min(self.options.kid_subset_size, len(next(iter(self.reference.held_out.values()))))
        return sample_scores(
            self.reference.held_out, self.reference.training, self.extractor, kid_subset_size=kid_subset_size
        )


def make_scorer(options: ScoreOptions, images: Images, held_out: Images, *, batch_size: int) -> Scorer | None:
    """A scorer against a recipe's own data; None for the extractor `none`.

    Args:
        options: of the scores.
        images: that the run trains on.
        held_out: that it does not.
        batch_size: images at a time and process.
    """
    if options.extractor == "none":
        return None
    sources = from_images("training images", images), from_images("held-out images", held_out)
    scorer = Scorer(options, *sources, batch_size=batch_size)
    note_foreign_features(scorer.extractor, images.name)
    return scorer


def _check_count(what: str, count: int, options: ScoreOptions, *, with_kid: bool = True) -> None:
    least = max(LEAST_IMAGES, options.kid_subset_size) if with_kid else LEAST_IMAGES
    if count < least:
        advice = "more images, or a smaller --kid_subset_size" if count >= LEAST_IMAGES else "more images"
        raise ValueError(f"{what}: {count} images are too few, the scores need at least {least}: give {advice}")


def _mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    values = features.double()
    return values.mean(0), values.T.cov().view(values.shape[1], values.shape[1])


def holds_statistics(path: Path) -> bool:
    """Whether an .npz holds statistics and not images."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return bool({"mu", "sigma"} & set(file.files))
    except Exception:  # what is damaged is neither; whoever reads it says so
        return False


def load_statistics_file(path: str) -> tuple[Tensor, Tensor]:
    """Mean `[features]` and covariance `[features, features]`, `mu` and `sigma` of an .npz, as pytorch-fid writes.

    Raises:
        ValueError: if the file holds no such statistics.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = torch.from_numpy(file["mu"]), torch.from_numpy(file["sigma"])
    except Exception as error:  # a zip file's, numpy's and the system's errors
        raise ValueError(f"cannot read statistics from {path}: {' '.join(str(error).split())[:200]}") from error
    if mean.is_complex() or covariance.is_complex():
        raise ValueError(f"the statistics in {path} are complex numbers")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError(f"the statistics in {path} are not finite")
    if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{path} holds mu {list(mean.shape)} and sigma {list(covariance.shape)}, which do not fit")
    values = covariance.double()
    largest = float(values.abs().max()) if len(values) else 0.0
    if not torch.allclose(values, values.T, rtol=0, atol=1e-3 * largest) or (values.diagonal() < 0).any():
        raise ValueError(f"sigma in {path} is no covariance: it is not symmetric, or has variances below 0")
    return mean, covariance


def cache_folder() -> Path:
    """Where features of references are kept: VKD_GEN_CACHE, else vkd_gen in the user's cache folder."""
    if "VKD_GEN_CACHE" in os.environ:
        return Path(os.environ["VKD_GEN_CACHE"]).expanduser() / "references"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vkd_gen" / "references"


def cached_features(source: ImageSource, extractor: Extractor, batch_size: int) -> tuple[dict[str, Tensor], str]:
    """Features by layer of all images, from disk if the same images went through the same weights before.

    Args:
        source: of the images.
        extractor: the network.
        batch_size: images at a time and process.

    Returns:
        Layer -> features, and the hash of the images' pixels.
    """
    state = PartialState()
    pixels = content_hash(source)
    layers = sorted(set(extractor.layers.values()))
    key = json.dumps([pixels, extractor.name, extractor.weights_hash, layers])
    path = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
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

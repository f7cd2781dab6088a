"""Scores of many sets of images against one reference."""

import contextlib
import logging
import math
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from vkd_gen.data.images import Images
from vkd_gen.evaluation.clip import load_clip
from vkd_gen.evaluation.extractors import Extractor, import_torch_fidelity, load_extractor
from vkd_gen.evaluation.labels import Score, data_label
from vkd_gen.evaluation.metrics import (
    Statistics,
    frechet_distance,
    inception_scores,
    memorization_scores,
    sample_scores,
)
from vkd_gen.evaluation.options import LEAST_IMAGES, SamplingOptions, ScoreOptions
from vkd_gen.evaluation.prompts import Prompts, of_images
from vkd_gen.evaluation.reference import cached_features
from vkd_gen.evaluation.samples import from_model
from vkd_gen.evaluation.sources import CLIP_LAYER, Features, ImageSource, extract_features, from_images
from vkd_gen.models import Model

logger = logging.getLogger(__name__)


def note_foreign_features(extractor: Extractor, data: str) -> None:
    """Say it where samples are scored by a small network that was trained on other data than they are compared to."""
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


class Scorer:
    """Scores sets of images against one reference.

    Args:
        options: of the scores.
        reference: images that models were trained on, or statistics.
        held_out: images that no model was trained on; None leaves out what they are needed for.
        batch_size: images at a time and process in the extractor.
        num_samples: how many images the smallest source will have; by default `options.num_score_samples`.
        prompts: that text pipelines make their samples of in `score_model`.

    Raises:
        ValueError: in one line, for too few images, an extractor that cannot be had.
    """

    def __init__(
        self,
        options: ScoreOptions,
        reference: ImageSource | Statistics,
        held_out: ImageSource | None = None,
        *,
        batch_size: int = 64,
        num_samples: int | None = None,
        prompts: Prompts | None = None,
    ):
        import_torch_fidelity()
        self.options, self.batch_size, self.prompts = options, batch_size, prompts
        num_samples = options.num_score_samples if num_samples is None else num_samples
        with_kid = isinstance(reference, ImageSource)  # saved statistics give FID alone
        _check_count("the samples", num_samples, options, with_kid=with_kid)
        if isinstance(reference, ImageSource):
            _check_count("the reference", reference.count, options)
        self.extractor = load_extractor(options.extractor, options.extractor_weights)
        self.extractor.network.to(PartialState().device)
        self.clip = load_clip(options.clip_model) if options.clip_model else None
        self._layer = self.extractor.layers["fid"]
        self._training: dict[str, Tensor] = {}
        self._held_out: dict[str, Tensor] = {}
        self._statistics: Statistics | None = None
        if isinstance(reference, ImageSource):
            of_reference = self._read_reference(reference, held_out)
            width = self._training[self._layer].shape[1]
        else:
            self._statistics, of_reference = reference, {"reference": "saved mean and covariance"}
            width = len(reference.mean)
            probe = self.extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[self._layer].shape[1]
            if probe != width:
                raise ValueError(
                    f"the saved statistics have {width} dimensions, the features of {self.extractor.name} "
                    f"{probe}: they were made with another network"
                )
        self.protocol: dict[str, Any] = {
            "extractor": self.extractor.name,
            "extractor_weights_sha256": self.extractor.weights_hash,
            **{f"extractor_{name}": value for name, value in self.extractor.facts.items()},
            "kid": f"100 subsets of {options.kid_subset_size}",
            **of_reference,
        }
        if self.clip is not None:
            self.protocol |= {"clip_model": self.clip.name, "clip_model_sha256": self.clip.weights_hash}
        """How every score of this object is taken."""
        if num_samples <= width and PartialState().is_main_process:
            logger.warning(
                "note: a FID from %d images in %d dimensions is biased upwards; compare it with FIDs of equally many "
                "images alone, and read KID beside it",
                num_samples,
                width,
            )

    def _read_reference(self, training: ImageSource, held_out: ImageSource | None) -> dict[str, Any]:
        protocol: dict[str, Any] = {"reference": dict(training.protocol)}
        self._training, protocol["reference_hash"] = cached_features(training, self.extractor, self.batch_size)
        if held_out is not None and held_out.count:
            self._held_out, _ = cached_features(held_out, self.extractor, self.batch_size)
            protocol["held_out"] = (
                f"{held_out.count} images that were not trained on; fid_training, fid_held_out and nearer_to_training "
                f"compare to them and to equally many training images"
            )
        return protocol

    def __call__(self, source: ImageSource, *, num_shown: int = 32) -> tuple[list[Score], Features]:
        """Scores of a set of images, and the features that they are taken from; called by all processes."""
        with contextlib.nullcontext() if self.clip is None else self.clip.on(PartialState().device):
            features = extract_features(
                source,
                self.extractor,
                clip=self.clip,
                batch_size=self.batch_size,
                num_shown=num_shown,
                progress=f"scoring {source.name}",
            )
        found: list[Any] = [[]]
        if PartialState().is_main_process:
            try:
                found = [self._scores_of(features.layers)]
            except ValueError as error:  # on all processes alike, else the others would wait for ever
                found = [error]
        broadcast_object_list(found)
        if isinstance(found[0], ValueError):
            raise found[0]
        return found[0], features

    def score_model(self, name: str, model: Model, *, num_shown: int = 32) -> tuple[list[Score], Features, ImageSource]:
        """Score a model's samples, image i from seed i; also returns where they came from."""
        with model.whole():  # once, and not for each batch
            source = from_model(
                name,
                model,
                SamplingOptions(),
                count=self.options.num_score_samples,
                num_inference_steps=self.options.num_inference_steps,
                guidance_scale=self.options.guidance_scale,
                prompts=self.prompts if model.takes_prompts else None,
            )
            return *self(source, num_shown=num_shown), source

    def _scores_of(self, features: dict[str, Tensor]) -> list[Score]:
        scores = self._scores_to_reference(features)
        if self.clip is not None and CLIP_LAYER in features:
            scores.append(Score("clip_score", self.clip.name, float(features[CLIP_LAYER].double().mean())))
        return scores

    def _scores_to_reference(self, features: dict[str, Tensor]) -> list[Score]:
        found, network = features[self._layer], self.extractor.network_of_scores
        if self._statistics is not None:
            distance = frechet_distance(found, self._statistics)
            if not math.isfinite(distance):
                raise ValueError(
                    "the FID to the saved statistics is not finite: are they of this extractor's features?"
                )
            return [Score("fid", network, distance), *inception_scores(features, self.extractor)]
        scores = self._compare_to_reference(features)
        if self._held_out:
            values: dict[str, float] = {}
            training, held_out = self._training[self._layer], self._held_out[self._layer]
            count = min(len(held_out), len(training))
            if count > 1:  # to equally many of both, so that they can be compared
                for name, rows in (("fid_training", training), ("fid_held_out", held_out)):
                    statistics = _statistics(rows[torch.arange(count) * len(rows) // count])
                    values[name] = frechet_distance(found, statistics)
            values |= memorization_scores(found, training, held_out)
            scores += [Score(name, network, value) for name, value in values.items()]
        return scores

    def scores_of_held_out(self) -> list[Score]:
        """The held-out images scored as if they were samples: what no model should be expected to beat."""
        if not self._held_out or len(self._held_out[self._layer]) < LEAST_IMAGES:
            return []
        return self._compare_to_reference(self._held_out)

    def _compare_to_reference(self, features: dict[str, Tensor]) -> list[Score]:
        kid_subset_size = min(self.options.kid_subset_size, len(features[self._layer]))
        return sample_scores(features, self._training, self.extractor, kid_subset_size=kid_subset_size)


def make_scorer(options: ScoreOptions, images: Images, held_out: Images, *, batch_size: int) -> Scorer | None:
    """A scorer against a recipe's own data; None for the extractor `none`."""
    if options.extractor == "none":
        return None
    prompts = of_images(held_out) or of_images(images)
    if options.clip_model and prompts is None:
        raise ValueError(f"--clip_model scores images by their prompts, and {images.name} was read without captions")
    sources = from_images("training images", images), from_images("held-out images", held_out)
    scorer = Scorer(options, *sources, batch_size=batch_size, prompts=prompts)
    note_foreign_features(scorer.extractor, images.name)
    return scorer


def _check_count(what: str, count: int, options: ScoreOptions, *, with_kid: bool = True) -> None:
    least = max(LEAST_IMAGES, options.kid_subset_size) if with_kid else LEAST_IMAGES
    if count < least:
        advice = "more images, or a smaller --kid_subset_size" if count >= LEAST_IMAGES else "more images"
        raise ValueError(f"{what}: {count} images are too few, the scores need at least {least}: give {advice}")


def _statistics(features: Tensor) -> Statistics:
    values = features.double()
    return Statistics(values.mean(0), values.T.cov().view(values.shape[1], values.shape[1]))

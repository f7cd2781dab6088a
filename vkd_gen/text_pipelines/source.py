"""Text-to-image pipelines that are known, and where their parts lie: in a folder, on the hub, or in one file.

Here configurations are read and compared, and headers of files; see load.py for the weights.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from vkd_gen.hub import hub_folder, split_revision
from vkd_gen.loading import pipeline_class, read_json
from vkd_gen.text_pipelines.parts import TOKENIZER_FILES
from vkd_gen.text_pipelines.single_file import configurations_of

PIPELINES: dict[type[DiffusionPipeline], dict[str, Any]] = {
    StableDiffusionPipeline: {"requires_safety_checker": False},
    StableDiffusionXLPipeline: {"add_watermarker": False},
}
"""Pipelines that are known, and what they are made with: no image is blackened or marked."""

CLASSES: dict[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
"""Classes that each part may be of; the scheduler may be any of diffusers'."""

LEFT_OUT = frozenset({"safety_checker", "feature_extractor", "image_encoder"})
"""Parts that are not loaded: students are trained, sampled and scored without them."""

CHANNELS = {9: "an inpainting UNet", 8: "a UNet that edits images, such as InstructPix2Pix's", 7: "an upscaler's UNet"}
"""What a UNet of more than a sample's channels is, by how many it reads."""


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Where a text-to-image pipeline lies.

    Attributes:
        name: as its user gave it.
        folder: with model_index.json, and a folder for each part.
        kind: its class, one of `PIPELINES`.
        index: what model_index.json holds.
        variant: of the weights, such as `fp16`.
        checkpoint: one file with all weights by their original names, of which `folder` is the configuration.
        is_here: the folder is no copy of the hub's, which has configurations alone until weights are asked for.
    """

    name: str
    folder: Path
    kind: type[DiffusionPipeline]
    index: Mapping[str, Any]
    variant: str | None = None
    checkpoint: Path | None = None
    is_here: bool = True

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that are loaded."""
        return tuple(name for name in inspect.signature(self.kind.__init__).parameters if name in self.index and name in
                     {*CLASSES, "scheduler"})  # fmt: skip

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of a model of diffusers or transformers."""
        return read_json(self.folder / part / "config.json")


def is_text_pipeline(index: Mapping[str, Any]) -> bool:
    """Whether a model_index.json is of one of `PIPELINES`."""
    return index.get("_class_name") in {kind.__name__ for kind in PIPELINES}


def find_source(source: str, *, variant: str | None = None, config: str | None = None) -> TextSource:
    """Find a text-to-image pipeline; of the hub's its configurations are downloaded.

    Args:
        source: folder of a pipeline or of a recipe's run, hub id, or an original checkpoint in one safetensors file.
        variant: of the weights in a folder or on the hub.
        config: folder or hub id of the pipeline whose configuration an original checkpoint has.

    Raises:
        ValueError: in one line: nothing there, or another pipeline than those of `PIPELINES`.
    """
    path = Path(source)
    if path.is_file():
        if variant is not None:
            raise ValueError(f"{source} is one file, which has no variant {variant}: leave --teacher_variant out")
        known = configurations_of(path)
        try:
            found = find_source(config or known)
        except ValueError as error:
            if config is not None:
                raise
            raise ValueError(
                f"{source} needs the configuration of its pipeline, {known}: train_student_unet.py takes a folder or "
                f"hub id of such a one by --teacher_config, other commands a whole pipeline ({error})"
            ) from error
        return TextSource(**{**vars(found), "name": source, "checkpoint": path})
    if config is not None:
        raise ValueError(f"{source} has its own configuration; --teacher_config is for checkpoints in one file")
    if path.is_dir():
        folder = next((place for place in (path, path / "pipeline") if (place / "model_index.json").exists()), None)
        if folder is None:
            raise ValueError(f"{source} holds no pipeline: neither model_index.json nor pipeline/model_index.json")
    else:
        if path.suffix in (".safetensors", ".ckpt") or split_revision(source)[0].count("/") != 1 or source[0] in "./~":
            raise ValueError(f"there is no pipeline folder or file {source}")
        files = ("config.json", "scheduler_config.json", *TOKENIZER_FILES)
        try:
            folder = hub_folder(source, ["model_index.json", *(f"{name}/{file}" for name in
                                                               (*CLASSES, "scheduler") for file in files)])  # fmt: skip
        except ValueError as error:
            raise ValueError(f"there is no pipeline folder {source}, and the hub did not give it: {error}") from error
    index = read_json(folder / "model_index.json")
    kind = _known_class(index, source)
    return TextSource(name=source, folder=folder, kind=kind, index=index, variant=variant, is_here=path.is_dir())


def _known_class(index: Mapping[str, Any], source: str) -> type[DiffusionPipeline]:
    try:
        kind = pipeline_class(index)
    except ValueError as error:
        raise ValueError(f"cannot load the pipeline {source}: {error}") from error
    if kind in PIPELINES:
        return kind
    known = " and ".join(kind.__name__ for kind in PIPELINES)
    hint = "pipelines of transformers come with a later version; " if "transformer" in index else ""
    if "controlnet" in index:
        hint = "name the pipeline without its ControlNet; "
    raise ValueError(f"{source} is a {kind.__name__}; {hint}text-to-image pipelines that are known are {known}")


def check_source(source: TextSource) -> None:
    """Refuse a pipeline whose parts are of other classes than its own, or do not fit one another.

    Raises:
        ValueError: in one line, naming the part.
    """
    for name in inspect.signature(source.kind.__init__).parameters:
        if name not in CLASSES:
            continue
        entry = source.index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or None in entry:
            refiner = "; a refiner makes no images of prompts alone" if name in ("text_encoder", "tokenizer") else ""
            raise ValueError(f"{source.name} has no {name}, which a {source.kind.__name__} needs{refiner}")
        if entry[0] not in ("diffusers", "transformers") or entry[1] not in CLASSES[name]:
            raise ValueError(f"{source.name}: its {name} is a {entry[1]}, and must be a {' or '.join(CLASSES[name])}")
    unet = _complete(UNet2DConditionModel, source.config("unet"))
    vae = _complete(AutoencoderKL, source.config("vae"))
    _check_unet(unet, vae["latent_channels"], source.name)
    encoders = [source.config(name) for name in ("text_encoder", "text_encoder_2") if name in source.parts]
    widths = [config.get("hidden_size", 512) for config in encoders]
    if sum(widths) != unet["cross_attention_dim"]:
        raise ValueError(
            f"{source.name}: its UNet reads prompts of width {unet['cross_attention_dim']} (cross_attention_dim), and "
            f"its text encoders make such of {' + '.join(map(str, widths))}: they are not of one model"
        )
    if len(encoders) == 2:
        needed = unet["projection_class_embeddings_input_dim"]
        made = encoders[1].get("projection_dim", 512) + 6 * (unet["addition_time_embed_dim"] or 0)
        if needed != made:
            raise ValueError(
                f"{source.name}: its UNet reads {needed} numbers of prompt and sizes, and its text_encoder_2 makes "
                f"{made} with six sizes: they are not of one model, or it is a refiner"
            )


def _complete(kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the class's defaults for what it leaves out."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {entry.name: config.get(entry.name, entry.default) for entry in parameters if entry.name != "self"}


def _check_unet(config: Mapping[str, Any], latent_channels: int, name: str) -> None:
    channels = config["in_channels"]
    if channels in CHANNELS and channels != latent_channels:
        raise ValueError(f"{name} has {CHANNELS[channels]}, of {channels} channels; one of text to image has 4")
    if (channels, config["out_channels"]) != (latent_channels, latent_channels):
        raise ValueError(
            f"{name}: its UNet maps latents of {channels} to {config['out_channels']} channels, and its VAE has "
            f"{latent_channels}: they are not of one model"
        )
    if config["time_cond_proj_dim"] is not None:
        raise ValueError(f"{name} is a consistency model, which is told of its guidance; name the model it was made of")
    for entry, known in (("class_embed_type", None), ("num_class_embeds", None), ("encoder_hid_dim_type", None)):
        if config[entry] != known:
            raise ValueError(
                f"{name}: its UNet has {entry} {config[entry]!r}, a condition beside prompts; that is unknown"
            )

"""Text-to-image pipelines from folders, files and the hub, part by part: no code is run, nothing is unpickled."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from torch import nn

from vkd_gen.hub import WEIGHTS, hub_folder
from vkd_gen.limits import check_sizes
from vkd_gen.loading import (
    check_betas,
    check_layout,
    check_memory,
    fill_model,
    model_without_weights,
    read_json,
    read_tensors,
    stored_layout,
    weight_files,
)
from vkd_gen.text import reason
from vkd_gen.text_pipelines.lora import merge_lora
from vkd_gen.text_pipelines.parts import (
    ENCODER_WEIGHTS,
    encoder_without_weights,
    fill_encoder,
    load_tokenizer,
    own_names,
)
from vkd_gen.text_pipelines.single_file import check_checkpoint_file, part_of_file
from vkd_gen.text_pipelines.source import CLASSES, PIPELINES, TextSource, check_source, find_source

NETWORKS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
"""Parts that are models of diffusers."""


def load_text_pipeline(
    source: str,
    *,
    variant: str | None = None,
    loras: Sequence[str] = (),
    config: str | None = None,
    parts: Iterable[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> DiffusionPipeline:
    """Load Stable Diffusion 1, 2 or XL with its weights, on the CPU and in eval mode.

    `safety_checker`, `feature_extractor` and `image_encoder` are left out.

    Args:
        source: folder of a pipeline or of a recipe's run, hub id (`ID@REVISION`), or an original checkpoint in one
            safetensors file.
        variant: of the weights, such as `fp16`; a part that has none of it is loaded without.
        loras: safetensors files, folders or hub ids of LoRA to merge, each with `=SCALE` behind it or as it is.
        config: folder or hub id of the pipeline whose configuration a checkpoint in one file has; by default the one
            that diffusers knows it by.
        parts: names of the parts to load, such as `unet`; the others are None. By default all.
        dtype: of the models; LoRA are merged in float32.

    Raises:
        ValueError: in one line: what is not there, is pickled, of another pipeline, or does not fit together.
    """
    found = find_source(source, variant=variant, config=config)
    check_source(found)
    makers = check_parts(found, parts)
    try:
        loaded = {name: make() for name, make in makers.items()}
    except Exception as error:  # damaged parts each have a class of their own
        raise ValueError(f"cannot load the pipeline {source}: {reason(error, 1000)}") from error
    pipeline = _assemble(found, loaded)
    for lora in loras:
        merge_lora(pipeline, lora)
    for part in loaded.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, dtype)  # past diffusers' warning about casting
    return pipeline


def check_parts(source: TextSource, parts: Iterable[str] | None = None) -> dict[str, Callable[[], Any]]:
    """Check parts by their configurations and the headers of their weights; of the hub they are downloaded.

    Args:
        source: from `find_source`, checked by `check_source`.
        parts: names of them; by default all.

    Returns:
        What loads each part.

    Raises:
        ValueError: in one line: no such part, and what is not there, is pickled or does not fit its configuration.
    """
    wanted = source.parts if parts is None else tuple(parts)
    unknown = sorted(set(wanted) - set(source.parts))
    if unknown:
        raise ValueError(
            f"a {source.kind.__name__} has no part {unknown[0]!r}; its parts are {', '.join(source.parts)}"
        )
    if not source.is_here:
        _download(source, wanted)
    if source.variant is not None:
        _check_variant(source, wanted)
    try:
        return {name: _checked_part(source, name) for name in wanted}
    except Exception as error:  # missing and foreign parts each have a class of their own
        raise ValueError(f"cannot load the pipeline {source.name}: {reason(error, 1000)}") from error


def pipeline_without_weights(source: TextSource) -> DiffusionPipeline:
    """Denoiser, VAE and sampler alone, the networks on the meta device, for a look at what a pipeline is.

    Raises:
        ValueError: as `check_parts`; weights on the hub are not looked at.
    """
    if source.is_here:
        check_parts(source)
    scheduler = _scheduler(source.index.get("scheduler"), source.folder / "scheduler")
    networks = {name: model_without_weights(kind, source.folder / name) for name, kind in NETWORKS.items()}
    return _assemble(source, {**networks, "scheduler": scheduler})


def _assemble(source: TextSource, loaded: dict[str, Any]) -> DiffusionPipeline:
    """The pipeline of these parts, and of None for others; what it knows of its VAE is right without it."""
    names = inspect.signature(source.kind.__init__).parameters
    absent = {name: None for name, entry in names.items() if name != "self" and entry.default in (None, entry.empty)}
    plain = {name: source.index[name] for name, entry in names.items() if isinstance(entry.default, bool)
             and isinstance(source.index.get(name), bool)}  # fmt: skip
    pipeline = source.kind(**{**absent, **plain, **PIPELINES[source.kind], **loaded})
    pipeline.set_progress_bar_config(disable=True)
    if "vae" not in loaded:
        pipeline.vae_scale_factor = 2 ** (len(source.config("vae")["block_out_channels"]) - 1)
        pipeline.image_processor.register_to_config(vae_scale_factor=pipeline.vae_scale_factor)
    return pipeline


def _checked_part(source: TextSource, name: str) -> Callable[[], Any]:
    """What loads a part, once all that can be known without its weights is right."""
    folder = source.folder / name
    if name == "scheduler":
        scheduler = _scheduler(source.index.get(name), folder)
        return lambda: scheduler
    if name.startswith("tokenizer"):
        longest = source.config(name.replace("tokenizer", "text_encoder")).get("max_position_embeddings", 77)
        words = load_tokenizer(folder, longest)
        vocabulary = source.config(name.replace("tokenizer", "text_encoder")).get("vocab_size", 49408)
        if len(words) > vocabulary:
            raise ValueError(
                f"the tokenizer {folder} has {len(words)} words and its text encoder {vocabulary}: they are not of one "
                "model"
            )
        return lambda: words
    is_encoder = name not in NETWORKS
    if is_encoder:
        model = encoder_without_weights(source.index[name][1], folder)
    else:
        model = model_without_weights(NETWORKS[name], folder)
    fill = fill_encoder if is_encoder else fill_model
    if source.checkpoint is not None:
        checkpoint = source.checkpoint
        check_checkpoint_file(checkpoint, name)
        check_memory(model, str(folder))
        return lambda: fill(model, part_of_file(checkpoint, name, model), f"{checkpoint} ({name})")
    files = _files(source, name)
    rename = own_names if is_encoder else _early_names
    check_layout(rename(model, stored_layout(files)), model, folder)
    check_memory(model, str(folder))

    def read() -> nn.Module:
        tensors = {name: value for file in files for name, value in read_tensors(file).items()}
        return fill(model, rename(model, tensors), folder)

    return read


def _early_names(model: nn.Module, stored: dict[str, Any]) -> dict[str, Any]:
    """Weights by today's names: diffusers renames those of early attention layers in place."""
    model._fix_state_dict_keys_on_load(stored)
    return stored


def _files(source: TextSource, name: str) -> list[Path]:
    """The safetensors of a part: of the variant that is asked for if the part has it."""
    folder, weights = source.folder / name, WEIGHTS if name in NETWORKS else ENCODER_WEIGHTS
    if source.variant is not None and _has_variant(folder, source.variant):
        return weight_files(folder, source.variant, weights)
    return weight_files(folder, None, weights)


def _has_variant(folder: Path, variant: str) -> bool:
    return folder.is_dir() and any(f".{variant}." in f"{path.name}." or f".{variant}-" in path.name
                                   for path in folder.iterdir())  # fmt: skip


def _check_variant(source: TextSource, wanted: Sequence[str]) -> None:
    """Refuse a variant that no part has."""
    folders = [source.folder / name for name in wanted if name in CLASSES and not name.startswith("tokenizer")]
    if source.variant is None or not folders or any(_has_variant(folder, source.variant) for folder in folders):
        return
    names = {path.name for folder in folders if folder.is_dir() for path in folder.glob("*.safetensors")}
    known = sorted({part for name in names for part in name.split(".")[1:-1]})
    has = f"it has {', '.join(known)}" if known else "its weights have none: leave --teacher_variant out"
    raise ValueError(f"{source.name} has no variant {source.variant!r}; {has}")


def _scheduler(entry: Any, folder: Path) -> SchedulerMixin:
    path = folder / "scheduler_config.json"
    config = read_json(path)
    kind: Any = getattr(diffusers, entry[1], None) if isinstance(entry, list) and entry[:1] == ["diffusers"] else None
    if not isinstance(kind, type) or not issubclass(kind, SchedulerMixin):
        raise ValueError(f"its scheduler is {str(entry)[:80]}, and must be one of diffusers'")
    if "beta_schedule" not in config and "trained_betas" not in config:
        raise ValueError(f"its {kind.__name__} is not a schedule of betas; flow matching comes with a later version")
    check_sizes(config, str(path), "schedule")
    return check_betas(kind.from_config(config), folder)  # type: ignore[attr-defined]


def _download(source: TextSource, wanted: Sequence[str]) -> None:
    """Weights of the parts from the hub: of the variant, and of parts without it the plain ones."""
    for variant in dict.fromkeys((source.variant, None)):
        patterns = [
            f"{name}/{file}"
            for name in wanted
            if name in CLASSES and not name.startswith("tokenizer")
            if variant or source.variant is None or not _has_variant(source.folder / name, source.variant)
            for file in _patterns(WEIGHTS if name in NETWORKS else ENCODER_WEIGHTS, variant)
        ]
        if patterns:
            hub_folder(source.name, patterns)


def _patterns(weights: str, variant: str | None) -> list[str]:
    dotted = f".{variant}" if variant else ""
    return [
        f"{weights}{dotted}.safetensors",
        f"{weights}{dotted}-*-of-*.safetensors",
        f"{weights}-*-of-*{dotted}.safetensors",
        f"{weights}.safetensors.index{dotted}.json",
    ]

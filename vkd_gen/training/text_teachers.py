"""Teachers that make images of prompts: found, checked, and loaded with their whole pipeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from vkd_gen.hub import hub_folder
from vkd_gen.loading import read_json
from vkd_gen.text_pipelines import TextSource, check_source, find_lora, find_source, load_text_pipeline
from vkd_gen.training.options import StudentOptions


def text_source(source: str, options: StudentOptions) -> TextSource | None:
    """The pipeline that a teacher's name is of, if it makes images of prompts, with its parts checked but for weights.

    Args:
        source: folder of a pipeline or a run, hub id, or a checkpoint in one file.
        options: with the flags that begin with `--teacher_`.

    Returns:
        None for all else: a UNet without a pipeline, a configuration, a pipeline without prompts.

    Raises:
        ValueError: in one line, for pipelines with prompts that are not known or do not fit together, a LoRA that is
            not there, and flags that are for such pipelines alone.
    """
    flags = {
        "variant": options.teacher_variant,
        "lora": options.teacher_lora or None,
        "config": options.teacher_config,
    }
    if not _takes_prompts(source):
        for name, value in flags.items():
            if value is not None:
                raise ValueError(
                    f"--teacher_{name} is for pipelines with prompts, and {source} is not one: name the folder, hub id "
                    "or .safetensors file of one by --teacher, or leave it out"
                )
        return None
    found = find_source(source, variant=options.teacher_variant, config=options.teacher_config)
    check_source(found)
    for lora in options.teacher_lora:
        find_lora(lora)
    return found


def _takes_prompts(source: str) -> bool:
    path = Path(source)
    if path.is_file():
        return path.suffix != ".json"
    _, index = pipeline_index(source) or (path, {})
    return "text_encoder" in index or ("transformer" in index and index.get("_class_name") != "DiTPipeline")


def pipeline_index(source: str) -> tuple[Path, dict[str, Any]] | None:
    """Where a pipeline lies, a folder here or in the hub's cache, and its model_index.json; None for all else."""
    path = Path(source)
    try:
        if path.is_dir():
            place = next((place for place in (path, path / "pipeline") if (place / "model_index.json").exists()), path)
        else:
            place = hub_folder(source, ["model_index.json"])
        return place, read_json(place / "model_index.json")
    except ValueError:  # a UNet, or nothing, as who loads it finds out
        return None


def load_parts_of(
    source: TextSource,
    options: StudentOptions,
    parts: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> DiffusionPipeline:
    """The teacher's pipeline, or some of its parts, as its flags say; see `load_text_pipeline`."""
    return load_text_pipeline(
        source.name,
        variant=options.teacher_variant,
        loras=options.teacher_lora,
        config=options.teacher_config,
        parts=parts,
        dtype=dtype,
    )

"""Text-to-image pipelines as stock folders that early and late versions of transformers read alike."""

import copy
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import nn

from vkd_gen.loading import read_tensors


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, variant: str | None = None) -> None:
    """Save a pipeline as `save_pretrained` does, and a second time in half precision if that is asked for.

    Args:
        pipeline: whole; left as it is.
        folder: to save it in.
        variant: None, or `fp16`: files of that variant are saved beside the others.

    Raises:
        ValueError: in one line, for weights that are too large for the variant.
    """
    pipeline.save_pretrained(folder, safe_serialization=True)
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    for name, part in networks.items() if variant is not None else ():
        half = nn.Module.to(copy.deepcopy(part), "cpu", torch.float16)
        broken = [key for key, value in half.state_dict().items() if not value.isfinite().all()]
        if broken:
            raise ValueError(f"the {name} cannot be saved as fp16: {broken[0]} is too large for it")
        config = folder / name / "config.json"
        in_float32 = config.read_bytes()
        half.save_pretrained(folder / name, variant=variant, safe_serialization=True)
        config.write_bytes(in_float32)  # transformers writes the precision there, and would load all else in it
    for name, part in pipeline.components.items():
        if name.startswith("text_encoder") and part is not None:
            _name_as_ever(folder / name)
        elif name.startswith("tokenizer") and part is not None:
            _save_words(folder / name)


def _name_as_ever(folder: Path) -> None:
    """Names of a text encoder's weights as in all published pipelines; transformers 5.6 and later save others."""
    for path in folder.glob("*.safetensors"):
        tensors = read_tensors(path)
        named = {
            name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": value
            for name, value in tensors.items()
        }
        if named.keys() != tensors.keys():
            save_file(named, path, metadata={"format": "pt"})


def _save_words(folder: Path) -> None:
    """vocab.json and merges.txt, which transformers 4 needs and 5 does not write."""
    if (folder / "vocab.json").exists():
        return
    words = json.loads((folder / "tokenizer.json").read_bytes())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in words["merges"]]
    (folder / "vocab.json").write_text(json.dumps(words["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")

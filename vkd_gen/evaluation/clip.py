"""CLIP score: how well an image fits its prompt, by a CLIP of transformers."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vkd_gen.cli import tensors_alone
from vkd_gen.hub import hub_folder
from vkd_gen.loading import check_file, read_json
from vkd_gen.provenance import hash_tensors
from vkd_gen.text import reason

FILES = ("*.json", "merges.txt", "model.safetensors", "model-*-of-*.safetensors")
"""What a CLIP is read from."""


# Not torchmetrics' CLIPScore: for a name that it does not know it runs the repository's own code to load the model, and
# it cuts the end-of-text token off long prompts, at which CLIP reads its answer.
@dataclass(frozen=True)
class Clip:
    """A frozen CLIP.

    Attributes:
        name: of the model, which stands beside each score.
        network: the module, for its device.
        processor: transformers' own for this model: tokenizer, resizing, normalisation.
        weights_hash: SHA-256 of the weights.
    """

    name: str
    network: nn.Module
    processor: Any
    weights_hash: str

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """On a device while the context lasts, and else on the CPU, where it takes no memory from what trains."""
        self.network.to(device)
        try:
            yield
        finally:
            self.network.cpu()

    @torch.no_grad()
    def __call__(
        self, images: UInt8[Tensor, "images channels height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " images"]:
        """The score of each image with its prompt, on the CPU: 100 times the cosine similarity, at least 0.

        After Hessel et al., 2021 (arXiv 2104.08718), with the factor 100 of torchmetrics in place of their 2.5. Prompts
        are cut at the model's length, 77 tokens, the last of them the end of the text.
        """
        pixels = list(images.expand(-1, 3, -1, -1).cpu())
        inputs = self.processor(text=list(prompts), images=pixels, return_tensors="pt", padding=True, truncation=True)
        found = self.network(**inputs.to(self.network.device))
        return (100 * (found.image_embeds * found.text_embeds).sum(-1)).clamp(min=0).float().cpu()


def load_clip(source: str) -> Clip:
    """Load a CLIP, onto the CPU.

    Args:
        source: folder of a `CLIPModel` as transformers saves it, with its processor; or hub id, `ID@REVISION`.

    Raises:
        ValueError: in one line, for what is not there or no such model, and where the hub does not give it.
    """
    try:
        from transformers import CLIPModel, CLIPProcessor
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError("--clip_model needs the package transformers: pip install 'vkd-gen[text]'") from error
    try:
        folder = Path(source) if Path(source).is_dir() else hub_folder(source, FILES)
        kind = read_json(folder / "config.json").get("model_type")
        if kind != "clip":
            raise ValueError(f"its config.json is of {str(kind)[:80]!r}, not of a whole CLIP, texts and images")
        if not list(folder.glob("model*.safetensors")):
            raise ValueError("its weights are missing: there is no model.safetensors")
        check_file(folder / "preprocessor_config.json" if _is_early(folder) else folder / "processor_config.json")
        logging.disable_progress_bar()
        with tensors_alone():
            loaded: Any = CLIPModel.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            network, info = loaded
            processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        if info["missing_keys"] or info["mismatched_keys"]:
            raise ValueError(f"its weights lack {sorted(info['missing_keys'] or info['mismatched_keys'])[0]}")
    except Exception as error:  # no network, missing and foreign files each have a class of their own
        raise ValueError(
            f"cannot load the --clip_model {source} ({reason(error)}); name the folder of a CLIP with its processor, "
            'or --clip_model "" for no CLIP score'
        ) from error
    network.float().eval().requires_grad_(False)
    longest = network.config.text_config.max_position_embeddings
    processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, longest)
    name = re.sub(r"[^\w.]+", "-", source.split("@")[0].rstrip("/").rsplit("/", 1)[-1]).strip("-") or "clip"
    return Clip(name, network, processor, hash_tensors(network.state_dict()))


def _is_early(folder: Path) -> bool:
    """Whether a processor was saved before transformers 5."""
    return (folder / "preprocessor_config.json").exists()

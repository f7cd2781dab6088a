"""What a pipeline of latents makes of images and prompts before the denoiser: latents and embeddings.

B batch, C latent channels, H x W pixels, h x w latents, L tokens, D width of the embeddings.
"""

import contextlib
import copy
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from vkd_gen.choices import Precision
from vkd_gen.provenance import hash_tensors

ENCODERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder", "feature_extractor")
"""Parts of a pipeline that the denoiser's training does without, once images and prompts are encoded."""
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Encoders:
    """The VAE and the text encoders of a Stable Diffusion pipeline (1, 2 or XL), called as the pipeline calls them.

    Of a `DiTPipeline` the VAE alone.

    Args:
        pipeline: whole; its encoders are brought to the precision.
        precision: that they compute in, and that their results have.
        tiling: encode large images tile by tile, which takes less memory and changes latents near the seams.
    """

    def __init__(self, pipeline: DiffusionPipeline, *, precision: Precision = "no", tiling: bool = False):
        # A copy with the same parts, since the model that has the pipeline lets go of them.
        self.pipeline, self.dtype, self.tiling = copy.copy(pipeline), DTYPES[precision], tiling
        self.vae = pipeline.vae
        for part in self._networks():
            nn.Module.to(part, dtype=self.dtype).eval().requires_grad_(False)  # past diffusers' warning about casting
        if tiling:
            self.vae.enable_tiling()
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        """Pixels by which an image is divided, per side."""
        self.is_xl = getattr(pipeline, "text_encoder_2", None) is not None

    def _networks(self) -> list[nn.Module]:
        parts = (getattr(self.pipeline, name, None) for name in ENCODERS)
        return [part for part in parts if isinstance(part, nn.Module)]

    def to(self, device: torch.device | str) -> "Encoders":
        """The same on a device."""
        for part in self._networks():
            part.to(device)
        return self

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> dict[str, Tensor]:
        """The distribution of the latents of images, scaled as the denoiser gets them.

        Args:
            pixels: `[B, 3, H, W]` in [-1, 1]; sides are multiples of `factor`.

        Returns:
            `mean` and `deviation`, `[B, C, h, w]` in the encoders' precision: latents are
            `mean + deviation * standard normal`.

        Raises:
            ValueError: in one line, if they are not finite.
        """
        config = self.vae.config
        found = self.vae.encode(pixels.to(self.vae.device, self.dtype)).latent_dist
        mean, deviation = found.mean.float(), found.std.float()
        scale: Any = config.scaling_factor
        if getattr(config, "latents_mean", None) and getattr(config, "latents_std", None):  # as SDXL's decodes
            shape = (1, -1, 1, 1)
            mean = mean - torch.tensor(config.latents_mean, device=mean.device).view(shape)
            scale = scale / torch.tensor(config.latents_std, device=mean.device).view(shape)
        rows = {"mean": mean * scale, "deviation": deviation * scale}
        if not all(value.isfinite().all() for value in rows.values()):
            cause = "its weights or the images" if self.dtype == torch.float32 else f"{self.dtype}"
            raise ValueError(
                f"the teacher's VAE gives latents that are not finite, for which {cause} must be the reason: "
                "--encoding_precision no computes them in float32"
            )
        return {name: value.to(self.dtype) for name, value in rows.items()}

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of prompts, by the pipeline's own `encode_prompt`.

        Returns:
            `encoder_hidden_states` `[B, L, D]` and, for SDXL, `text_embeds` `[B, P]`, in the encoders' precision.
        """
        found = self._encode(list(prompts), with_null=False)
        return {name: value for name, (value, _) in found.items()}

    @torch.no_grad()
    def null_prompt(self) -> dict[str, Tensor]:
        """What the pipeline gives its denoiser for no prompt when it guides: SD's empty prompt, SDXL's zeros; B = 1."""
        return {name: value for name, (_, value) in self._encode([""], with_null=True).items()}

    def _encode(self, prompts: list[str], *, with_null: bool) -> dict[str, tuple[Tensor, Any]]:
        device = self._networks()[-1].device
        with _without_warnings():
            found = self.pipeline.encode_prompt(
                prompt=prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=with_null
            )
        rows = {"encoder_hidden_states": found[:2]}
        if self.is_xl:
            rows["text_embeds"] = found[2:]
        rows = {
            name: tuple(value if value is None else value.to(self.dtype) for value in pair)
            for name, pair in rows.items()
        }
        if not all(value.isfinite().all() for pair in rows.values() for value in pair if value is not None):
            raise ValueError(
                f"the teacher's text encoder gives embeddings that are not finite in {self.dtype}, such as of "
                f"{prompts[0][:80]!r}: --encoding_precision no computes them in float32"
            )
        return rows

    def num_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts have more tokens than the text encoder takes, which leaves out the rest."""
        tokenizer = self.pipeline.tokenizer or self.pipeline.tokenizer_2
        lengths = map(len, tokenizer(list(prompts), truncation=False, verbose=False).input_ids)
        return sum(length > tokenizer.model_max_length for length in lengths)

    def facts(self) -> dict[str, dict[str, Any]]:
        """Hashes of what decides latents, and of what decides embeddings: weights, configurations and tokenizers."""
        vae = {name: value for name, value in self.vae.config.items() if not name.startswith("_")}
        texts = {}
        for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
            part = getattr(self.pipeline, name, None)
            if isinstance(part, nn.Module):
                texts[name] = _hash_of(hash_tensors(part.state_dict()), part.config.to_json_string())
            elif part is not None:
                texts[name] = _hash_files(part)
        precision = {"precision": str(self.dtype).removeprefix("torch.")}
        return {
            "latents": {"vae": _hash_of(hash_tensors(self.vae.state_dict()), vae), "tiling": self.tiling, **precision},
            "prompts": {**texts, "class": type(self.pipeline).__name__, **precision},
        }


def _hash_of(*values: Any) -> str:
    return hashlib.sha256(" ".join(map(str, values)).encode()).hexdigest()


def _hash_files(tokenizer: Any) -> str:
    """SHA-256 over the files that a tokenizer saves: its words, merges, special tokens and length."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Without a warning for each prompt that is cut; they are counted instead."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)

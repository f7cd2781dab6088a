"""Text-to-image pipelines of stock classes, a tenth of the real widths and random weights, to test on."""

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

Kind = Literal["sd1", "sd2", "sdxl"]
MAX_LENGTH = 16


def tiny_pipeline(kind: Kind, folder: Path | None = None, seed: int = 0) -> DiffusionPipeline:
    """Stable Diffusion 1 (epsilon), 2 (v-prediction, zero terminal SNR) or XL: 32 x 32 pixels, 16 x 16 latents.

    Args:
        kind: which.
        folder: to save it in, as `save_pretrained` does.
        seed: of its weights.
    """
    torch.manual_seed(seed)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    parts: dict[str, Any] = {"vae": _vae(kind), "tokenizer": tokenizer(), "text_encoder": _text_encoder(32)}
    match kind:
        case "sd1":
            parts |= {"unet": _unet(32), "scheduler": PNDMScheduler(**betas, skip_prk_steps=True)}
        case "sd2":
            zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            parts |= {
                "unet": _unet(32, attention_head_dim=(2, 4, 4, 4), use_linear_projection=True),
                "scheduler": DDIMScheduler(**betas, **zero, clip_sample=False, set_alpha_to_one=False),
            }
        case "sdxl":
            more = {
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "block_out_channels": (32, 64, 64),
                "attention_head_dim": (2, 4, 4),
                "transformer_layers_per_block": (1, 2, 3),
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 6 * 8 + 24,
            }
            parts |= {
                "unet": _unet(32 + 24, **more),
                "scheduler": EulerDiscreteScheduler(**betas, timestep_spacing="leading"),
                "text_encoder_2": _text_encoder(24, with_projection=True),
                "tokenizer_2": tokenizer(pad="!"),
            }
    if kind == "sdxl":
        pipeline: DiffusionPipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, **absent)
    pipeline.set_progress_bar_config(disable=True)
    if folder is not None:
        pipeline.save_pretrained(folder, safe_serialization=True)
    return pipeline


def _unet(text_width: int, **more: Any) -> UNet2DConditionModel:
    arguments: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 32, 64, 64),
        "norm_num_groups": 8,
        "attention_head_dim": 2,
        "cross_attention_dim": text_width,
        "layers_per_block": 2,
    }
    return UNet2DConditionModel(**{**arguments, **more}).eval()


def _vae(kind: Kind) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.13025 if kind == "sdxl" else 0.18215,
        force_upcast=kind == "sdxl",
    ).eval()


def tokenizer(pad: str = "<|endoftext|>") -> Any:
    """A CLIP tokenizer of single characters and a few words."""
    from transformers import CLIPTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789,.-'!"]
    merges = ["r e", "re d</w>", "b l", "u e</w>", "bl ue</w>", "a t</w>", "c at</w>", "h e", "a r"]
    entries = [*letters, *(letter + "</w>" for letter in letters)]
    entries += ["".join(merge.split()) for merge in merges]
    vocab = {entry: number for number, entry in enumerate([*entries, "<|startoftext|>", "<|endoftext|>"])}
    with tempfile.TemporaryDirectory() as folder:  # transformers 4 reads files alone, and 5 them too
        (Path(folder) / "vocab.json").write_text(json.dumps(vocab))
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        return CLIPTokenizer.from_pretrained(folder, **_specials(pad))


def _specials(pad: str) -> dict[str, Any]:
    return {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
        "model_max_length": MAX_LENGTH,
    }


def _text_encoder(width: int, *, with_projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config).eval()

"""A small Stable Diffusion of stock classes, with random weights."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from vkd_gen.training.text_options import TextTeacherOptions

START, END = "<|startoftext|>", "<|endoftext|>"
"""CLIP's special tokens."""


def save_tokenizer(captions: Sequence[str], options: TextTeacherOptions, folder: Path) -> None:
    """Write the files of a `CLIPTokenizer` whose byte pairs are learned from the captions' words.

    All bytes are tokens, as in CLIP, so that any prompt can be said; the files are the slow tokenizer's, vocab.json and
    merges.txt, which every version of transformers reads.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    words = Counter(word for caption in captions for word in caption.lower().split() if word.isascii())
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    split = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges: list[tuple[str, str]] = []
    while len(tokens) + 2 < options.vocab_size:
        pairs = Counter[tuple[str, str]]()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        tokens.append("".join(best))
        split = {word: _merged(parts, best) for word, parts in split.items()}
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": options.max_tokens, "do_lower_case": True}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **special}, indent=2))


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def build_text_teacher(options: TextTeacherOptions, tokenizer_folder: Path) -> StableDiffusionPipeline:
    """The pipeline with random weights that depend on the seed alone."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    width, stages = options.text_width, len(options.unet_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                projection_dim=width,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=options.max_tokens,
                bos_token_id=start,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=options.vae_channels,
            latent_channels=options.latent_channels,
            norm_num_groups=8,
            sample_size=options.resolution,
            scaling_factor=1.0,
        )
        unet = UNet2DConditionModel(
            sample_size=options.resolution // 4,
            in_channels=options.latent_channels,
            out_channels=options.latent_channels,
            layers_per_block=1,
            block_out_channels=options.unet_channels,
            down_block_types=("CrossAttnDownBlock2D",) * stages,
            up_block_types=("CrossAttnUpBlock2D",) * stages,
            cross_attention_dim=width,
            attention_head_dim=tuple(channels // 16 for channels in options.unet_channels),  # their number, in fact
            norm_num_groups=16,
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )

"""A tiny CLIP of random weights, with its processor, to score by."""

from pathlib import Path

import torch

from tests.text_pipelines import MAX_LENGTH, tokenizer


def save_clip(folder: Path, seed: int = 0) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(seed)
    words = tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    specials = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**sizes, **specials, "vocab_size": len(words), "max_position_embeddings": MAX_LENGTH}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder, safe_serialization=True)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(image_processor=CLIPImageProcessor(**size), tokenizer=words).save_pretrained(folder)
    return folder

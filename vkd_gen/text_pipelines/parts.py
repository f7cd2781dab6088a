"""Parts of text-to-image pipelines that are transformers' own: text encoders and tokenizers, by key and without code.

transformers' `from_pretrained` also reads what else lies in a folder, such as adapters of other models; here a text
encoder is made of the known entries of its config.json and of weights by name, a tokenizer of its two files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vkd_gen.limits import check_sizes
from vkd_gen.loading import fill_model, read_json
from vkd_gen.text import reason

ENTRIES = (
    *("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range"),
    *("initializer_factor", "pad_token_id", "bos_token_id", "eos_token_id"),
)
"""Entries of a CLIP text encoder's config.json; others, such as those that choose code for attention, are not read."""

ENCODER_WEIGHTS = "model"
"""The name of a text encoder's weights in its folder, before the suffix."""

TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
"""Files of a tokenizer: the first two must be there, or the third, which transformers 5 saves in their place."""


def encoder_without_weights(kind: str, folder: Path) -> nn.Module:
    """The text encoder that a folder's config.json describes, on the meta device.

    Args:
        kind: `CLIPTextModel` or `CLIPTextModelWithProjection`.
        folder: of its config.json.

    Raises:
        ValueError: in one line: no such configuration, or sizes that no model has.
    """
    import transformers

    path = folder / "config.json"
    config = read_json(path)
    check_sizes(config, str(path), "text encoder")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{path} is of a quantised text encoder; name a folder with its own weights")
    try:
        settings = transformers.CLIPTextConfig(**{entry: config[entry] for entry in ENTRIES if entry in config})
        with torch.device("meta"):
            return getattr(transformers, kind)(settings)
    except Exception as error:  # transformers checks little, and what it does not check fails in all kinds of ways
        raise ValueError(f"{path} is no text encoder that transformers can build: {reason(error, 300)}") from error


def fill_encoder(model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> nn.Module:
    """Fill a text encoder on the meta device; see `fill_model`."""
    fill_model(model, own_names(model, tensors), source)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:  # numbers of the positions, the one buffer that is not saved
                assert name == "position_ids", name
                module.register_buffer(name, torch.arange(buffer.shape[-1])[None], persistent=False)
    return model


def own_names(model: nn.Module, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Weights by the names that this version of transformers has for them: with `text_model.` in front, or without."""
    is_wrapped = any(name.startswith("text_model.") for name in model.state_dict())
    named: dict[str, Any] = {}
    for name, value in stored.items():
        bare = name.removeprefix("text_model.")
        if bare.endswith("position_ids"):  # early versions saved them
            continue
        named[f"text_model.{bare}" if is_wrapped and bare != "text_projection.weight" else bare] = value
    return named


def load_tokenizer(folder: Path, longest: int) -> Any:
    """A CLIP tokenizer from its files.

    Args:
        folder: of vocab.json and merges.txt.
        longest: tokens that the text encoder takes, which the tokenizer's own limit is bounded by.

    Raises:
        ValueError: in one line, for files that are not there or no tokenizer's.
    """
    from transformers import CLIPTokenizer

    missing = [name for name in TOKENIZER_FILES[:2] if not (folder / name).is_file()]
    if missing and not (folder / TOKENIZER_FILES[2]).is_file():
        raise ValueError(
            f"the tokenizer {folder} is without its {missing[0]}: take vocab.json and merges.txt from the pipeline "
            "that it is of"
        )
    for name in TOKENIZER_FILES:
        if name.endswith(".json") and (folder / name).exists():
            read_json(folder / name)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    except Exception as error:  # what transformers does not check fails in all kinds of ways
        raise ValueError(f"the tokenizer {folder} cannot be loaded: {reason(error, 300)}") from error
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    return tokenizer

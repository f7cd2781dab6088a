"""A smaller UNet's configuration from the teacher's."""

import math

from diffusers import ModelMixin


def build_student(teacher: ModelMixin, *, width: float = 1.0, layers_per_block: int | None = None) -> ModelMixin:
    """A student of the teacher's class with random weights.

    Args:
        teacher: a diffusers `UNet2DModel`.
        width: factor on every stage's channels, above 0; rounded up to a multiple of the number of groups of the
            group norms and of the channels of an attention head.
        layers_per_block: residual layers of each block; default: the teacher's.

    Returns:
        A UNet whose configuration `from_config` and `save_pretrained` take unchanged.

    Raises:
        ValueError: for a factor or count out of range.
    """
    if not 0 < width < math.inf:
        raise ValueError(f"width must be above 0 and finite, not {width}")
    if layers_per_block is not None and layers_per_block < 1:
        raise ValueError(f"layers_per_block must be at least 1, not {layers_per_block}")
    config = {name: value for name, value in teacher.config.items() if name != "_name_or_path"}
    blocks = (*config["down_block_types"], *config["up_block_types"])
    has_attention = config["add_attention"] or any("Attn" in block for block in blocks)
    head = (config["attention_head_dim"] or 1) if has_attention else 1
    multiple = math.lcm(config["norm_num_groups"], head)
    channels = [multiple * math.ceil(count * width / multiple) for count in config["block_out_channels"]]
    if width <= 1:  # a teacher whose heads do not divide its channels is not widened
        channels = [min(pair) for pair in zip(channels, config["block_out_channels"], strict=True)]
    config["block_out_channels"] = tuple(channels)
    config["layers_per_block"] = layers_per_block or config["layers_per_block"]
    return type(teacher).from_config(config)

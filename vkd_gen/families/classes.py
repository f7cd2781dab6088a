"""Which class of diffusers a configuration is of, and all of its entries."""

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import DiTTransformer2DModel, ModelMixin, UNet2DConditionModel, UNet2DModel

from vkd_gen.features import bare

CLASSES: tuple[type[ModelMixin], ...] = (UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel)
"""Denoisers of known architectures."""
KNOWN = "UNet2DModel, UNet2DConditionModel and DiTTransformer2DModel"


def network_class(config: Mapping[str, Any]) -> type[ModelMixin]:
    """The class that a configuration is of: as it says itself, else, as of a model in memory, by its entries.

    Raises:
        ValueError: in one line, for one of no known architecture.
    """
    name = config.get("_class_name")
    if name is None:
        if "num_embeds_ada_norm" in config and "block_out_channels" not in config:
            return DiTTransformer2DModel
        return UNet2DConditionModel if "cross_attention_dim" in config else UNet2DModel
    for kind in CLASSES:
        if kind.__name__ == name:
            return kind
    raise ValueError(f"the configuration is of {str(name)[:80]}; known are {KNOWN}")


def are_transformers(student: ModelMixin, teacher: ModelMixin) -> bool:
    """Whether student and teacher are transformers; UNets otherwise.

    Raises:
        ValueError: in one line, if they are not of one architecture.
    """
    student_is, teacher_is = (isinstance(bare(network), DiTTransformer2DModel) for network in (student, teacher))
    if student_is != teacher_is:
        raise ValueError(
            f"a {type(student).__name__} cannot start from the weights of a {type(teacher).__name__}: they are "
            "inherited within one architecture"
        )
    return teacher_is


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that the class takes, with its defaults for those that a config.json leaves out."""
    parameters = inspect.signature(network_class(config).__init__).parameters.values()
    return {entry.name: config.get(entry.name, entry.default) for entry in parameters if entry.name != "self"}

"""Denoisers of known architectures: called, paired, made smaller and inherited from.

What differs between architectures is one value, a `Family`. For a new one: its functions in a file of its own here,
and a case in `family_of`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, ModelMixin, UNet2DConditionModel, UNet2DModel

from vkd_gen.families import dit, unet
from vkd_gen.families.activations import step0_error
from vkd_gen.families.build import build_student, kept_stages, reduce_config
from vkd_gen.families.depth import best_layers, compare_layer_choices, layer_choices
from vkd_gen.families.family import Family, Stage, unknown
from vkd_gen.families.inherit import Inheritance, inherit_weights
from vkd_gen.families.specs import PUBLISHED, TEACHERS, PublishedCost, published_cost
from vkd_gen.features import FeatureCapture, bare, check_layers, first_output
from vkd_gen.reductions import REDUCTIONS, Reduction

__all__ = [
    "PUBLISHED",
    "REDUCTIONS",
    "TEACHERS",
    "Family",
    "Inheritance",
    "PublishedCost",
    "Reduction",
    "Stage",
    "best_layers",
    "build_student",
    "compare_layer_choices",
    "copy_without_weights",
    "family_of",
    "feature_shapes",
    "inherit_weights",
    "kept_stages",
    "layer_choices",
    "published_cost",
    "reduce_config",
    "run_without_weights",
    "step0_error",
]

UNET = Family(
    call=unet.call,
    feature=first_output,
    stages=unet.stages,
    example=unet.example,
    reduce=reduce_config,
    inherit=inherit_weights,
    best_layers=best_layers,
    smaller=lambda _config, said: Reduction(**{"width": 0.5, **said}),
)
DIT = Family(
    call=dit.call,
    feature=first_output,
    stages=dit.stages,
    example=dit.example,
    prepare=dit.prepare,
    reduce=reduce_config,
    inherit=inherit_weights,
    best_layers=best_layers,
    smaller=lambda config, said: Reduction(**(said or {"blocks": (config["num_layers"] + 1) // 2})),
)


def family_of(network: Any) -> Family:
    """The family of a network that is in no wrapper.

    Raises:
        ValueError: for a model of an unknown kind, a pipeline, a folder's name, and what `bare` refuses.
    """
    match bare(network):
        case UNet2DModel() | UNet2DConditionModel():
            return UNET
        case DiTTransformer2DModel():
            return DIT
    raise ValueError(unknown(network))


def copy_without_weights(network: ModelMixin) -> ModelMixin:
    """The same network on the meta device: it has shapes, but neither weights nor memory."""
    family_of(network)
    # diffusers' private notes say, for one, which entries to reset to their defaults.
    config = {name: value for name, value in network.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        return type(network).from_config(config)


def run_without_weights(copy: ModelMixin) -> None:
    """One forward pass of a network from `copy_without_weights`.

    Raises:
        ValueError: in one line, if it cannot be run on a sample of its own size, or on any conditions known here.
    """
    with torch.device("meta"), torch.no_grad():
        try:
            family = family_of(copy)
            family.run(copy, family.example(copy))
        except Exception as error:  # diffusers checks little: what does not fit may end in any kind of error
            size, reason = copy.config.sample_size, " ".join(str(error).split())[:300]
            raise ValueError(f"{type(copy).__name__} cannot take a sample of size {size}: {reason}") from error


def feature_shapes(network: ModelMixin, layers: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the named layers' outputs for one sample, without computing anything: fast at any size.

    Args:
        network: a denoiser of a known family.
        layers: as for `FeatureCapture`.

    Returns:
        Layer name -> `(C, H, W)` for maps, `(N, C)` for tokens.

    Raises:
        ValueError: for an unknown layer name, or if the sample size does not fit the number of stages.
    """
    layers = check_layers(bare(network), layers)
    copy = copy_without_weights(network)
    capture = FeatureCapture(copy, layers, family_of(copy).feature)
    capture.start()
    run_without_weights(copy)
    return {layer: tuple(feature.shape[1:]) for layer, feature in capture.stop().items()}

"""vkd-gen: distil a diffusion UNet into a smaller one, with the VkD feature loss beside the denoising objective.

A library of losses and modules around models that you build: it loads no models, owns no optimizer, wraps nothing and
keeps no registry. The recipes put it together; `distillation_losses` is the step they share.

The names are loaded when they are first used, so that commands can read their flags before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vkd_gen.version import __version__ as __version__

if TYPE_CHECKING:
    from vkd_gen.calibration import calibrate
    from vkd_gen.distillation import FrozenTeacher, LossWeights, ProjectedStudent, distillation_losses
    from vkd_gen.families import (
        REDUCTIONS,
        Inheritance,
        Reduction,
        best_layers,
        build_student,
        inherit_weights,
        published_cost,
        reduce_config,
    )
    from vkd_gen.features import FeatureCapture
    from vkd_gen.normalization import FeatureNormalizer, FeatureStatistics, width_floor
    from vkd_gen.pairing import LayerPair, pair_layers, pair_table
    from vkd_gen.projectors import IdentityProjector, LinearProjector, OrthogonalProjector, parameter_groups
    from vkd_gen.schedule import Schedule

__all__ = [
    "REDUCTIONS",
    "FeatureCapture",
    "FeatureNormalizer",
    "FeatureStatistics",
    "FrozenTeacher",
    "IdentityProjector",
    "Inheritance",
    "LayerPair",
    "LinearProjector",
    "LossWeights",
    "OrthogonalProjector",
    "ProjectedStudent",
    "Reduction",
    "Schedule",
    "best_layers",
    "build_student",
    "calibrate",
    "distillation_losses",
    "inherit_weights",
    "pair_layers",
    "pair_table",
    "parameter_groups",
    "published_cost",
    "reduce_config",
    "width_floor",
]

_MODULES = ("calibration", "distillation", "families", "features", "normalization", "pairing", "projectors", "schedule")


def __getattr__(name: str) -> Any:
    """A public name, or a module that holds some, on its first use."""
    if name in _MODULES:
        return import_module(f"vkd_gen.{name}")
    if name in __all__:
        modules = (import_module(f"vkd_gen.{module}") for module in _MODULES)
        value = globals()[name] = next(getattr(module, name) for module in modules if hasattr(module, name))
        return value
    raise AttributeError(f"module 'vkd_gen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

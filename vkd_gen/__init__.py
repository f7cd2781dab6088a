"""vkd-gen: distil a diffusion UNet into a smaller one, with the VkD feature loss beside the denoising objective.

A library of losses and modules around models that you build: it loads no models, owns no optimizer, wraps nothing and
keeps no registry. The recipes put it together; `distillation_losses` is the step they share.
"""

from vkd_gen.calibration import calibrate, load_statistics, save_statistics
from vkd_gen.distillation import FrozenTeacher, LossWeights, ProjectedStudent, distillation_losses
from vkd_gen.features import FeatureCapture
from vkd_gen.normalization import FeatureNormalizer, FeatureStatistics, width_floor
from vkd_gen.pairing import LayerPair, pair_layers, pair_table
from vkd_gen.projectors import (
    IdentityProjector,
    LeastSquaresProjector,
    LinearProjector,
    OrthogonalProjector,
    parameter_groups,
)
from vkd_gen.schedule import Schedule
from vkd_gen.students import (
    REDUCTIONS,
    Inheritance,
    Reduction,
    best_layers,
    build_student,
    inherit_weights,
    published_cost,
    reduce_config,
)
from vkd_gen.version import __version__ as __version__

__all__ = [
    "REDUCTIONS",
    "FeatureCapture",
    "FeatureNormalizer",
    "FeatureStatistics",
    "FrozenTeacher",
    "IdentityProjector",
    "Inheritance",
    "LayerPair",
    "LeastSquaresProjector",
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
    "load_statistics",
    "pair_layers",
    "pair_table",
    "parameter_groups",
    "published_cost",
    "reduce_config",
    "save_statistics",
    "width_floor",
]

"""Projectors between a student layer's channels and the teacher's targets.

Ds student channels, Dt target channels, wide = max, narrow = min of the two. B batch, N positions. A projector takes
student rows `[B, N, Ds]` and target rows `[B, N, Dt]` and returns both in one space, ready for the feature loss.
"""

from vkd_gen.projectors.base import Projector, parameter_groups
from vkd_gen.projectors.baselines import IdentityProjector, LinearProjector
from vkd_gen.projectors.matrices import orthonormality_error, procrustes, random_orthonormal
from vkd_gen.projectors.orthogonal import LearnedProjector, OrthogonalProjector, ProjectorMethod, SolvedProjector
from vkd_gen.projectors.statistics import RunningCrossCovariance, sampling_stride

__all__ = [
    "IdentityProjector",
    "LearnedProjector",
    "LinearProjector",
    "OrthogonalProjector",
    "Projector",
    "ProjectorMethod",
    "RunningCrossCovariance",
    "SolvedProjector",
    "orthonormality_error",
    "parameter_groups",
    "procrustes",
    "random_orthonormal",
    "sampling_stride",
]

"""Students: smaller UNets made from a teacher."""

from vkd_gen.students.build import Reduction, build_student, kept_stages, reduce_config
from vkd_gen.students.inherit import copy_matching_weights
from vkd_gen.students.specs import PUBLISHED, REDUCTIONS, TEACHERS, PublishedCost, published_cost

__all__ = [
    "PUBLISHED",
    "REDUCTIONS",
    "TEACHERS",
    "PublishedCost",
    "Reduction",
    "build_student",
    "copy_matching_weights",
    "kept_stages",
    "published_cost",
    "reduce_config",
]

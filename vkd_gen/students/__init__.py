"""Students: smaller UNets made from a teacher."""

from vkd_gen.reductions import REDUCTIONS, Reduction
from vkd_gen.students.activations import step0_error
from vkd_gen.students.build import build_student, kept_stages, reduce_config
from vkd_gen.students.depth import best_layers, compare_layer_choices, layer_choices
from vkd_gen.students.inherit import Inheritance, inherit_weights
from vkd_gen.students.specs import PUBLISHED, TEACHERS, PublishedCost, published_cost

__all__ = [
    "PUBLISHED",
    "REDUCTIONS",
    "TEACHERS",
    "Inheritance",
    "PublishedCost",
    "Reduction",
    "best_layers",
    "build_student",
    "compare_layer_choices",
    "inherit_weights",
    "kept_stages",
    "layer_choices",
    "published_cost",
    "reduce_config",
    "step0_error",
]

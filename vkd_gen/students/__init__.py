"""Students: smaller UNets made from a teacher."""

from vkd_gen.students.activations import step0_error
from vkd_gen.students.build import REDUCTIONS, Reduction, build_student, reduce_config
from vkd_gen.students.depth import best_layers, compare_layer_choices, layer_choices
from vkd_gen.students.inherit import Inheritance, inherit_weights

__all__ = [
    "REDUCTIONS",
    "Inheritance",
    "Reduction",
    "best_layers",
    "build_student",
    "compare_layer_choices",
    "inherit_weights",
    "layer_choices",
    "reduce_config",
    "step0_error",
]

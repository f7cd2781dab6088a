"""Students: smaller UNets made from a teacher."""

from vkd_gen.students.build import REDUCTIONS, Reduction, build_student, reduce_config
from vkd_gen.students.inherit import copy_matching_weights

__all__ = ["REDUCTIONS", "Reduction", "build_student", "copy_matching_weights", "reduce_config"]

"""Students: smaller UNets made from a teacher."""

from vkd_gen.students.build import build_student
from vkd_gen.students.inherit import copy_matching_weights

__all__ = ["build_student", "copy_matching_weights"]

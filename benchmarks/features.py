"""What matching features costs beside the forward and backward passes, in operations that torch counts.

python benchmarks/features.py
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch.utils.flop_counter import FlopCounterMode

import vkd_gen as vkd
from measuring import RESULTS, write_results
from vkd_gen.cli import run_command
from vkd_gen.evaluation.tables import print_columns
from vkd_gen.families import copy_without_weights
from vkd_gen.families.classes import network_class
from vkd_gen.families.specs import TEACHERS
from vkd_gen.families.unet import call
from vkd_gen.training.matching import build_matching
from vkd_gen.training.methods import METHODS, MatchingOptions
from vkd_gen.training.muon import inner_matrices, orthogonalize

STUDENTS = {"half width": vkd.Reduction(width=0.5), "bk-small": vkd.REDUCTIONS["bk-small"]}
BATCH_SIZE, NUM_TOKENS = 8, 77

DEFAULT = METHODS["vkd"]
VARIANTS: dict[str, MatchingOptions] = {
    **{f"--method {name}": method for name, method in METHODS.items() if method.feature_weight},
    "refresh each step": replace(DEFAULT, projector_refresh_steps=1),
    **{f"projector {kind}": replace(DEFAULT, projector=kind) for kind in ("cayley", "matrix_exp")},
    **{f"normalization {kind}": replace(DEFAULT, feature_normalization=kind) for kind in ("whiten", "batch_whiten")},
    **{f"loss {kind}": replace(DEFAULT, feature_loss=kind) for kind in ("smooth_l1", "cka")},
}
"""The methods with a feature loss, then the default with one thing changed."""


@dataclass(frozen=True, kw_only=True)
class FeatureCostConfig:
    """Where to write."""

    output: str = str(RESULTS / "features.json")
    """File for the numbers."""


OPERATIONS = {
    torch.ops.aten._linalg_eigh: lambda a, *_, **__: 9 * a[-1] ** 3,  # 8.3; LAPACK's divide and conquer takes less
    torch.ops.aten.linalg_cholesky_ex: lambda a, *_, **__: a[-1] ** 3 / 3,  # 4.2
    torch.ops.aten.linalg_solve_triangular: lambda a, b, **_: a[-1] * math.prod(b),  # 3.1
    torch.ops.aten._linalg_solve_ex: lambda a, b, **_: 2 / 3 * a[-1] ** 3 + 2 * a[-1] * math.prod(b),  # 3.2
    torch.ops.aten.linalg_lu_solve: lambda a, _pivots, b, **_: 2 * a[-1] * math.prod(b),
    # Five products, for 1-norms up to 1.09: the polynomial of Bader, Blanes and Casas, 2019, Mathematics 7(12).
    torch.ops.aten.linalg_matrix_exp: lambda a, *_, **__: 5 * 2 * a[-1] ** 3,
}
"""What torch's counter does not count, after Golub and Van Loan, Matrix Computations, 4th edition, by chapter."""


def pair_operations(pair: vkd.LayerPair, batch_size: int, options: MatchingOptions) -> float:
    """What a layer pair adds to a step, forward and backward, on the average of all steps.

    The recipe's own parts make the steps, on random rows of the pair's shapes.
    """
    generator = torch.Generator().manual_seed(0)
    covariance = torch.eye(pair.teacher_channels, dtype=torch.float64)  # what features are does not change the cost
    bins = options.num_timestep_bins
    mean, scale = torch.zeros(bins, pair.teacher_channels), torch.ones(bins)
    projector, normalizer = build_matching(options, pair)
    normalizer.fill(vkd.FeatureStatistics(mean, scale, covariance, covariance))
    every = options.projector_refresh_steps

    def step(number: int, samples: int, positions: int) -> float:
        rows = torch.randn(samples, positions, pair.student_channels, generator=generator, requires_grad=True)
        target = torch.randn(samples, positions, pair.teacher_channels, generator=generator)
        with FlopCounterMode(display=False, custom_mapping=OPERATIONS) as counter:
            normalized = normalizer(target, torch.full((samples,), 500))
            projector.losses(rows, normalized, options.feature_loss).sum().backward()
            projector.after_step(number)
        return counter.get_total_flops()

    positions = math.prod(pair.teacher_shape) // pair.teacher_channels
    if not hasattr(projector, "refresh_every_steps"):  # nothing is solved
        return step(1, batch_size, positions)
    # Not counted: it fills the running statistics with rows enough for the refresh to be of full rank.
    step(1, 2, 2 * max(pair.student_channels, pair.teacher_channels))
    plain, refreshed = step(every + 1, batch_size, positions), step(2 * every, batch_size, positions)
    return plain + (refreshed - plain) / every


def inputs_of(unet: ModelMixin, batch_size: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Random latents, timesteps and text embeddings on the default device."""
    size = unet.config.sample_size
    sample = torch.randn(batch_size, unet.config.in_channels, size, size)
    text = torch.randn(batch_size, NUM_TOKENS, unet.config.cross_attention_dim)
    return sample, torch.full((batch_size,), 500), {"encoder_hidden_states": text}


def count_floor(student: ModelMixin, teacher: ModelMixin, batch_size: int) -> dict[str, float]:
    """Operations of the student's forward and backward pass and of the teacher's forward pass, on the meta device."""
    counts = {}
    for name, unet in (("teacher_forward", teacher), ("student_forward_backward", student)):
        copy = copy_without_weights(unet).requires_grad_(unet is student)
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            prediction = call(copy, *inputs_of(copy, batch_size))
            if unet is student:
                prediction.sum().backward()
        counts[name] = float(counter.get_total_flops())
    return counts


def count(
    teacher: ModelMixin, reduction: vkd.Reduction, batch_size: int, variants: dict[str, MatchingOptions]
) -> dict[str, Any]:
    """The floor, and for each variant the operations of all pairs and their share of the floor."""
    with torch.device("meta"):
        student = vkd.build_student(teacher, reduction)
    pairs = vkd.pair_layers(student, teacher)
    floor = count_floor(student, teacher, batch_size)
    counted: dict[str, dict[str, float]] = {}
    for name, options in variants.items():
        operations = sum(pair_operations(pair, batch_size, options) for pair in pairs)
        counted[name] = {"operations": operations, "share_of_floor": operations / sum(floor.values())}
    operations = muon_operations(student)
    counted["--optimizer muon"] = {"operations": operations, "share_of_floor": operations / sum(floor.values())}
    return {"floor": floor, "variants": counted}


def muon_operations(student: ModelMixin) -> float:
    """What `--optimizer muon` adds to a step: the updates of all matrices made orthogonal, on the meta device."""
    with FlopCounterMode(display=False) as counter:
        for parameter in inner_matrices(student):
            orthogonalize(torch.empty_like(parameter, device="meta").flatten(1)[None])
    return float(counter.get_total_flops())


def stable_diffusion() -> ModelMixin:
    """The teacher, on the meta device."""
    config = TEACHERS["stable-diffusion-1"]
    with torch.device("meta"):
        return network_class(config).from_config(config)


def main(config: FeatureCostConfig) -> None:
    """Count, show and write."""
    teacher = stable_diffusion()
    counted = {name: count(teacher, reduction, BATCH_SIZE, VARIANTS) for name, reduction in STUDENTS.items()}
    for name, result in counted.items():
        total = sum(result["floor"].values())
        variants = result["variants"].values()
        print(f"\n{name}: floor {total / 1e12:.2f} TFLOP")
        operations = [f"{row['operations'] / 1e9:.1f}" for row in variants]
        shares = [f"{row['share_of_floor']:.2%}" for row in variants]
        print_columns(list(result["variants"]), [("GFLOP", operations), ("share", shares)])
    write_results(
        Path(config.output),
        {"counted": counted},
        teacher="stable-diffusion-1",
        batch_size=BATCH_SIZE,
        num_tokens=NUM_TOKENS,
        refresh_every_steps=DEFAULT.projector_refresh_steps,
    )


if __name__ == "__main__":
    run_command(main, FeatureCostConfig, __doc__)

"""What matching features costs beside the forward and backward passes, in operations counted.

python benchmarks/features.py
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

import vkd_gen as vkd
from vkd_gen.cli import run_command
from vkd_gen.distillation import predict
from vkd_gen.evaluation.cost import count_parameters
from vkd_gen.features import copy_without_weights
from vkd_gen.losses import FeatureLoss
from vkd_gen.normalization import Normalization
from vkd_gen.projectors import sampling_stride
from vkd_gen.provenance import environment, write_json
from vkd_gen.students.build import unet_class
from vkd_gen.students.specs import TEACHERS
from vkd_gen.training.matching import METHODS, NUM_DIAGNOSTIC_DRAWS
from vkd_gen.training.options import MatchingOptions

RESULTS = Path(__file__).parent / "results" / "features.json"
STUDENTS = {"half width": vkd.Reduction(width=0.5), "bk-small": vkd.REDUCTIONS["bk-small"]}
NUM_TOKENS = 77

ProjectorKind = Literal["solved", "fixed", "cayley", "matrix_exp", "least_squares", "linear", "identity"]
Part = Literal["projection", "statistics", "refresh", "normalization", "loss"]
PARTS: tuple[Part, ...] = ("projection", "statistics", "refresh", "normalization", "loss")

REFRESH_EVERY_STEPS = MatchingOptions().projector_refresh_steps

# Operations of what no counter of matrix products sees. n is the matrix' size, m x n with m >= n of what is not square.
EIGENDECOMPOSITION = 9.0
"""n^3, symmetric, with vectors. Golub and Van Loan, Matrix Computations, 4th edition, 8.3: reduction to tridiagonal
form and QR with the transformations kept. What LAPACK does, divide and conquer, takes less."""
SVD = (6.0, 20.0)
"""m n^2 and n^3, of U, S and V where the columns of U are as many as those of V (the same book, 8.6: R-SVD)."""
CHOLESKY = 1 / 3
"""n^3 (the same book, 4.2)."""
LU = 2 / 3
"""n^3 (the same book, 3.2)."""
TRIANGULAR_SOLVE = 1.0
"""n^2 for each right-hand side (the same book, 3.1)."""
EXPONENTIAL_PRODUCTS = 5
"""Matrix products of torch's exponential, for 1-norms up to 1.09: the polynomial of degree 18 of Bader, Blanes and
Casas, 2019, Mathematics 7(12), 1174. Larger ones take one more for each doubling of the norm."""
ADAMW = 14
"""Element by element, for each parameter."""


@dataclass(frozen=True, kw_only=True)
class FeatureCostConfig:
    """What to count."""

    batch_size: int = 8
    """Images per step."""
    output: str = str(RESULTS)
    """File for the numbers."""


@dataclass(frozen=True)
class Operations:
    """Some operations of a training step.

    Attributes:
        part: what they belong to.
        flops: floating-point operations, two for a multiply-accumulate, on the average of all steps.
        is_product: whether they are a matrix product that stands as such in the code, which torch's counter sees.
    """

    part: Part
    flops: float
    is_product: bool = False


def product(part: Part, rows: int, inner: int, columns: int, times: float = 1.0) -> Operations:
    """Matrix products of `rows x inner` by `inner x columns`."""
    return Operations(part, 2.0 * rows * inner * columns * times, is_product=True)


def projector_operations(
    kind: ProjectorKind,
    rows: int,
    student: int,
    target: int,
    *,
    sampled_rows: int | None = None,
    is_narrow: bool = False,
    refresh_every_steps: int = REFRESH_EVERY_STEPS,
) -> list[Operations]:
    """Of a projector in a step: forward, backward and `after_step`.

    Element by element what grows with the rows or the map is counted, one for each addition, product, root or quotient.

    Args:
        kind: of projector.
        rows: batch times positions.
        student: channels.
        target: channels, after normalisation.
        sampled_rows: that the statistics of a solved or fixed projector see; by default all.
        is_narrow: compared in the student's space, see `OrthogonalProjector.compare_narrow`.
        refresh_every_steps: optimizer steps between two solutions.
    """
    narrow, wide = sorted((student, target))
    seen = rows if sampled_rows is None else sampled_rows
    map_size, every = student * target, refresh_every_steps
    forward = product("projection", rows, student, target)
    statistics = [  # sums, centring and squares of rows; then moments added, merged and, for the gain, weighed
        product("statistics", student, seen, target),
        Operations("statistics", 4.0 * seen * (student + target) + 13.0 * map_size),
    ]
    # Centring of the rows, gain times map.
    centred = Operations("projection", float(rows * (student + target) + map_size))
    match kind:
        case "identity":
            return []
        case "linear":  # backward to the rows and to the map; bias and its gradient
            return [forward, forward, forward, Operations("projection", 2.0 * rows * target)]
        case "solved" | "fixed":
            # No gradient reaches the target, where it is what is projected.
            operations = [forward, centred, *statistics] + ([] if is_narrow or student > target else [forward])
            if kind == "solved":
                # Gram matrix, vectors times map and back, and the Newton-Schulz step's two.
                operations.append(product("refresh", narrow, narrow, wide, 5 / every))
                operations.append(Operations("refresh", (EIGENDECOMPOSITION * narrow**3 + 5.0 * map_size) / every))
            return operations
        case "least_squares":
            both = student + target
            factor = CHOLESKY * student**3 + 2 * TRIANGULAR_SOLVE * student**2 * target
            return [
                forward,
                forward,
                centred,
                product("statistics", student, rows, both),
                Operations("statistics", 4.0 * rows * (student + both) + 11.0 * student * both),
                Operations("refresh", factor / every),
            ]
        case "cayley" | "matrix_exp":
            return learned_operations(kind, rows, student, target)
    raise ValueError(f"unknown projector {kind!r}")


def learned_operations(kind: Literal["cayley", "matrix_exp"], rows: int, student: int, target: int) -> list[Operations]:
    """Of a learned orthogonal projector."""
    narrow, wide = sorted((student, target))
    # Rows through the map; backward to the rows and to the map, or to the map alone where it stands on the target.
    through = [product("projection", rows, student, target)] * (2 if student > target else 3)
    operations = [*through, product("projection", wide, wide, narrow, 2)]  # base times rotation, and backward
    operations.append(Operations("projection", 2.0 * rows * wide + 8.0 * wide**2))
    if kind == "cayley":
        solve = LU * wide**3 + 2 * TRIANGULAR_SOLVE * wide**3
        backward = 2 * TRIANGULAR_SOLVE * wide**3
        operations.append(product("projection", wide, wide, wide))  # the gradient of the matrix solved by
        return [*operations, Operations("projection", solve + backward)]
    # The derivative is taken from the exponential of a matrix of twice the size.
    exponentials = 2.0 * EXPONENTIAL_PRODUCTS * (wide**3 + (2 * wide) ** 3)
    return [*operations, Operations("projection", exponentials)]


def normalizer_operations(kind: Normalization, rows: int, channels: int, rank: int) -> list[Operations]:
    """Of a normaliser in a step; it has no backward pass."""
    match kind:
        case "none":
            return []
        case "layer_norm":  # mean, variance, difference, quotient
            return [Operations("normalization", 6.0 * rows * channels)]
        case "center" | "standardize":
            return [Operations("normalization", 2.0 * rows * channels)]
        case "whiten":
            return [
                Operations("normalization", float(rows * channels)),
                product("normalization", rows, channels, rank),
            ]
        case "batch_whiten":
            factor = CHOLESKY * channels**3 + TRIANGULAR_SOLVE * channels**2 * rows
            return [
                product("normalization", channels, rows, channels),
                Operations("normalization", factor + 2.0 * rows * channels + 4.0 * channels**2),
            ]
    raise ValueError(f"unknown normalization {kind!r}")


def loss_operations(
    kind: FeatureLoss, batch_size: int, positions: int, channels: int, *, outside_of: int = 0
) -> list[Operations]:
    """Of the feature loss of one pair: forward, and backward to the student's side.

    Args:
        kind: of loss.
        batch_size: samples.
        positions: of a sample.
        channels: that are compared.
        outside_of: channels of the target that are more than those; what lies outside is squared.
    """
    entries = float(batch_size * positions * channels)
    match kind:
        case "mse":
            outside = 2.0 * batch_size * positions * (channels + outside_of) if outside_of else 0.0
            return [Operations("loss", 5 * entries + outside)]
        case "smooth_l1":
            return [Operations("loss", 8 * entries)]
        case "cka":
            # Three products of channels by channels; two of them have a derivative to the student, one a twofold one.
            products = product("loss", channels, positions, channels, 6.0 * batch_size)
            return [products, Operations("loss", 14 * entries + 6.0 * batch_size * channels**2)]
    raise ValueError(f"unknown feature loss {kind!r}")


def pair_operations(
    pair: vkd.LayerPair,
    batch_size: int,
    *,
    projector: ProjectorKind = "solved",
    normalization: Normalization = "none",
    loss: FeatureLoss = "mse",
    refresh_every_steps: int = REFRESH_EVERY_STEPS,
) -> list[Operations]:
    """All that a layer pair adds to a step."""
    student, channels = pair.student_channels, pair.teacher_channels
    target = min(student, channels) if normalization == "whiten" else channels
    positions = math.prod(pair.teacher_shape) // channels
    rows = batch_size * positions
    is_narrow = loss == "mse" and projector in ("solved", "fixed") and student <= target
    compared = student if is_narrow else max(student, target)
    return [
        *projector_operations(
            projector,
            rows,
            student,
            target,
            sampled_rows=batch_size * -(-positions // sampling_stride(positions)),
            is_narrow=is_narrow,
            refresh_every_steps=refresh_every_steps,
        ),
        *normalizer_operations(normalization, rows, channels, target),
        *loss_operations(loss, batch_size, positions, compared, outside_of=target if is_narrow else 0),
    ]


def flops_of(operations: Sequence[Operations], part: Part | None = None) -> float:
    """Sum over the operations, or over those of one part."""
    return sum(entry.flops for entry in operations if part in (None, entry.part))


def count_floor(student: ModelMixin, teacher: ModelMixin, batch_size: int) -> dict[str, float]:
    """Operations of student forward, backward and optimizer and of the teacher's forward, on the meta device.

    Products, convolutions and attention alone: norms and activations are left out, which makes all shares of it larger.
    """
    counts = {}
    for name, unet in (("teacher_forward", teacher), ("student_forward_backward", student)):
        copy = copy_without_weights(unet).requires_grad_(unet is student)
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            sample, timesteps, text = inputs_of(copy, batch_size)
            prediction = predict(copy, sample, timesteps, text)
            if unet is student:
                prediction.sum().backward()
        counts[name] = float(counter.get_total_flops())
    counts["optimizer"] = float(ADAMW * count_parameters(student))
    return counts


def inputs_of(unet: ModelMixin, batch_size: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Random latents, timesteps and text embeddings on the default device."""
    size = unet.config.sample_size
    sample = torch.randn(batch_size, unet.config.in_channels, size, size)
    text = torch.randn(batch_size, NUM_TOKENS, unet.config.cross_attention_dim)
    return sample, torch.full((batch_size,), 500), {"encoder_hidden_states": text}


def look_share(floor: dict[str, float], batch_size: int, every_steps: int) -> float:
    """What a look at the gradients every so many steps takes, as a share of the floor.

    A look at its draws: the student's forward and one backward for each of two terms; then both networks' features
    again.
    """
    student_forward = floor["student_forward_backward"] / 3
    look = 2 * floor["teacher_forward"] + (2 + 2 * 2) * student_forward
    return look * NUM_DIAGNOSTIC_DRAWS / batch_size / every_steps / sum(floor.values())


def variants() -> dict[str, dict[str, Any]]:
    """Name -> arguments of `pair_operations`: the methods, then one thing changed in the default."""
    keys = {"projector": "projector", "feature_normalization": "normalization", "feature_loss": "loss"}
    found: dict[str, dict[str, Any]] = {
        f"--method {name}": {keys[key]: value for key, value in method.items() if key in keys}
        for name, method in METHODS.items()
        if "projector" in method
    }
    for kind in ("fixed", "cayley", "matrix_exp", "least_squares", "linear"):
        found[f"projector {kind}"] = {"projector": kind}
    for kind in ("layer_norm", "center", "standardize", "whiten", "batch_whiten"):
        found[f"normalization {kind}"] = {"normalization": kind}
    for kind in ("smooth_l1", "cka"):
        found[f"loss {kind}"] = {"loss": kind}
    return found | {"refresh each step": {"refresh_every_steps": 1}}


def count(teacher: ModelMixin, reduction: vkd.Reduction, batch_size: int) -> dict[str, Any]:
    """The floor, the default method by pair, and all variants."""
    student = vkd.build_student(teacher, reduction)
    pairs = vkd.pair_layers(student, teacher)
    floor = count_floor(student, teacher, batch_size)
    total = sum(floor.values())
    by_pair = []
    for pair in pairs:
        operations = pair_operations(pair, batch_size)
        by_pair.append(
            {
                "pair": f"{pair.student}:{pair.teacher}",
                "student_shape": pair.student_shape,
                "teacher_shape": pair.teacher_shape,
                **{part: flops_of(operations, part) for part in PARTS},
                "share_of_floor": flops_of(operations) / total,
            }
        )
    by_variant = {}
    for name, choice in variants().items():
        operations = [entry for pair in pairs for entry in pair_operations(pair, batch_size, **choice)]
        by_variant[name] = {part: flops_of(operations, part) for part in PARTS}
        by_variant[name]["share_of_floor"] = flops_of(operations) / total
    narrow_and_wide = [sorted((pair.student_channels, pair.teacher_channels)) for pair in pairs]
    by_svd = sum(SVD[0] * wide * narrow**2 + SVD[1] * narrow**3 for narrow, wide in narrow_and_wide)
    return {
        "floor": floor,
        "pairs": by_pair,
        "variants": by_variant,
        "share_of_refreshes_by_svd": by_svd / REFRESH_EVERY_STEPS / total,
        "share_of_looks": look_share(floor, batch_size, MatchingOptions().diagnostics_every_steps),
    }


# ---- output


def show(name: str, counted: dict[str, Any]) -> None:
    """Two tables."""
    total = sum(counted["floor"].values())
    console = Console(width=118)
    headings = [f"{part}, GFLOP" for part in PARTS]
    table = Table("pair", "channels", "positions", *headings, "share", title=f"{name}: floor {total / 1e12:.2f} TFLOP")
    for row in counted["pairs"]:
        channels = f"{row['student_shape'][0]} -> {row['teacher_shape'][0]}"
        positions = f"{row['teacher_shape'][1]} x {row['teacher_shape'][2]}"
        numbers = [f"{row[part] / 1e9:.2f}" for part in PARTS]
        table.add_row(row["pair"], channels, positions, *numbers, f"{row['share_of_floor']:.3%}")
    console.print(table)
    table = Table("all pairs", *headings, "share")
    for variant, row in counted["variants"].items():
        table.add_row(variant, *[f"{row[part] / 1e9:.1f}" for part in PARTS], f"{row['share_of_floor']:.2%}")
    console.print(table)
    print(
        f"refreshes, if all took the SVD: {counted['share_of_refreshes_by_svd']:.2%}; "
        f"looks at gradients: {counted['share_of_looks']:.2%}",
        flush=True,
    )


def main(config: FeatureCostConfig) -> None:
    """Count, show and write."""
    if config.batch_size < 1:
        raise ValueError("--batch_size must be at least 1")
    teacher_config = TEACHERS["stable-diffusion-1"]
    with torch.device("meta"):
        teacher = unet_class(teacher_config).from_config(teacher_config)
        counted = {name: count(teacher, reduction, config.batch_size) for name, reduction in STUDENTS.items()}
    for name, result in counted.items():
        show(name, result)
    output = Path(config.output)
    protocol = {
        "teacher": "stable-diffusion-1",
        "batch_size": config.batch_size,
        "num_tokens": NUM_TOKENS,
        "refresh_every_steps": REFRESH_EVERY_STEPS,
        "environment": environment(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {"counted": counted, "protocol": protocol})
    print(f"written to {output}")


if __name__ == "__main__":
    run_command(main, FeatureCostConfig, __doc__)

"""What a recipe's user says about the distillation, and the projected student that comes of it."""

import math
from functools import partial

from diffusers import ModelMixin

import vkd_gen as vkd
from vkd_gen.data.draws import Draws
from vkd_gen.diagnostics import Diagnostics, guidance_gap_ratio
from vkd_gen.distillation import matching_table
from vkd_gen.models import Model
from vkd_gen.projectors import Projector, random_orthonormal
from vkd_gen.training.feature_weight import FeatureWeight
from vkd_gen.training.loop import Loop
from vkd_gen.training.methods import MatchingOptions
from vkd_gen.training.run import Run

NUM_DIAGNOSTIC_DRAWS = 64
"""Draws of training images, with noise that no step sees, that the diagnostics look at."""


def pair_named_or_all(options: MatchingOptions, student: ModelMixin, teacher: ModelMixin) -> list[vkd.LayerPair]:
    """The pairs that the user names, or those of --layers; none without a feature loss.

    Raises:
        ValueError: for layers that cannot be paired, or that the feature loss says nothing about.
    """
    if not options.feature_weight:
        return []
    named = [(text.split(":")[0], text.split(":")[-1]) for text in options.layer_pairs]
    pairs = vkd.pair_layers(student, teacher, layers=options.layers, pairs=named or None)
    if options.feature_loss == "cka":
        for pair in pairs:
            if math.prod(pair.student_shape) == pair.student_channels:
                raise ValueError(
                    f"layer {pair.student} has a single position, and --feature_loss cka compares positions with one "
                    "another; leave the layer out by --layers or --layer_pairs, or choose --feature_loss mse"
                )
    for pair in pairs:
        widths = pair.student_channels, target_channels(options, pair)
        if options.projector == "identity" and widths[0] != widths[1]:
            raise ValueError(
                "student and target need equal widths without a projector (--method bk, --projector identity), and "
                f"layer {pair.student} has {widths[0]} channels for {widths[1]}; choose "
                "--student bk-base, bk-small or bk-tiny, or --student_width 1, or another --projector"
            )
    return pairs


def check_branches(options: MatchingOptions, teacher: Model, name: str) -> None:
    """Refuse to ask for both branches of a model that is told nothing.

    Raises:
        ValueError: in one line.
    """
    if options.guidance_branches == "both" and not (teacher.takes_prompts or teacher.num_classes):
        raise ValueError(
            f"--guidance_branches both asks each draw with its prompt or class and without, and the teacher {name} "
            "takes neither; leave it out"
        )


def target_channels(options: MatchingOptions, pair: vkd.LayerPair) -> int:
    """Channels of a pair's normalised targets."""
    if options.feature_normalization != "whiten":
        return pair.teacher_channels
    reachable = min(pair.student_channels, pair.teacher_channels)
    return reachable if options.whitening_rank is None else options.whitening_rank


def build_matching(options: MatchingOptions, pair: vkd.LayerPair) -> tuple[Projector, vkd.FeatureNormalizer]:
    """Projector and normaliser of one layer pair, not yet calibrated."""
    try:
        normalizer = vkd.FeatureNormalizer(
            options.feature_normalization,
            channels=pair.teacher_channels,
            rank=target_channels(options, pair),
            exponent=options.whitening_exponent,
            shrinkage=options.whitening_shrinkage,
            num_timestep_bins=options.num_timestep_bins,
        )
    except ValueError as error:
        raise ValueError(f"layer {pair.teacher}: {error}") from error
    widths = pair.student_channels, normalizer.target_channels
    match options.projector:
        case "linear":
            return vkd.LinearProjector(*widths), normalizer
        case "identity":
            return vkd.IdentityProjector(*widths), normalizer
        case "random":
            start = random_orthonormal(*sorted(widths))
            return vkd.OrthogonalProjector(*widths, method="fixed", start=start), normalizer
        case "solved" | "cayley" | "matrix_exp" as method:
            refresh = options.projector_refresh_steps
            start_at = options.projector_start
            projector = vkd.OrthogonalProjector(*widths, method=method, start=start_at, refresh_every_steps=refresh)
            return projector, normalizer
    raise ValueError(f"unknown projector {options.projector!r}")


def build_projected_student(
    options: MatchingOptions,
    student: ModelMixin,
    teacher: vkd.FrozenTeacher,
    pairs: list[vkd.LayerPair],
    draws: Draws,
    run: Run,
) -> tuple[vkd.ProjectedStudent, FeatureWeight]:
    """What trains, and the weight of its feature loss; calibrated where no checkpoint will do that.

    Args:
        options: of the recipe.
        student: the student.
        teacher: with the features that the pairs name.
        pairs: of layers; none for a student that learns from no features.
        draws: of the run, with the student's schedule.
        run: begun.
    """
    num_steps, device = run.options.max_train_steps, run.device
    if not pairs:
        projected = vkd.ProjectedStudent(student, schedule=draws.schedule)
        return projected, FeatureWeight(None, weights=options.weights, num_steps=num_steps)
    schedule, apart = draws.schedule.to(device), partial(draws.apart, device=device)
    matchings = [build_matching(options, pair) for pair in pairs]
    projected = vkd.ProjectedStudent(student, pairs, *zip(*matchings, strict=True), schedule=draws.schedule).to(device)
    if run.is_fresh:
        count = options.calibration_samples
        projected.calibrate(teacher, apart(count), schedule, start_batches=apart(min(512, count)))
        run.print(matching_table(projected, options.feature_loss))
    diagnostics = Diagnostics(
        projected,
        teacher,
        apart(NUM_DIAGNOSTIC_DRAWS),
        schedule=schedule,
        feature_loss_kind=options.feature_loss,
        timestep_weighting=options.timestep_weighting,
        snr_gamma=options.snr_gamma,
    )
    features = FeatureWeight(
        diagnostics,
        weighting=options.feature_weighting,
        weights=options.weights,
        decay_start=options.feature_decay_start,
        decay_end=options.feature_decay_end,
        num_steps=num_steps,
        every_steps=options.diagnostics_every_steps,
    )
    run.accelerator.register_for_checkpointing(features)
    if run.is_fresh:
        features.start()
    return projected, features


def measure_at_times(
    loop: Loop,
    features: FeatureWeight,
    options: MatchingOptions,
    projected: vkd.ProjectedStudent,
    teacher: vkd.FrozenTeacher,
    draws: Draws,
) -> None:
    """Let a loop measure what the feature weight follows, and the guidance gap ratio of the averaged student.

    That is measured at the steps of the diagnostics and the last; models that are told nothing have none.

    Args:
        loop: of the run.
        features: from `build_projected_student`.
        options: of the recipe.
        projected: the module that trains, in no wrapper.
        teacher: as in the steps.
        draws: of the run.
    """
    loop.every(1, features.measure)
    every, last, device = options.diagnostics_every_steps, loop.options.max_train_steps, loop.accelerator.device
    schedule, nothing = draws.schedule.to(device), draws.samples.nothing
    if not every or not nothing(next(draws.apart(1, device=device))["conditioning"]):
        return
    batches = list(draws.apart(NUM_DIAGNOSTIC_DRAWS, device=device, guidance_dropout=0.0))

    def measure(_step: int) -> dict[str, float]:
        ratio = guidance_gap_ratio(projected, teacher, batches, nothing, schedule)
        return {"diagnostics/guidance_gap_ratio": ratio}

    for steps in (every, last) if last % every else (every,):
        loop.every(steps, measure, averaged=True)

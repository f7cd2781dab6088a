"""Memory and time to train students of Stable Diffusion on several GPUs, computed from what can be counted without one.

python benchmarks/scaling.py
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor

import vkd_gen as vkd
from vkd_gen.evaluation.cost import LiveBytes, count_macs, count_parameters
from vkd_gen.features import example_inputs
from vkd_gen.provenance import environment, write_json
from vkd_gen.students.build import unet_class
from vkd_gen.students.specs import TEACHERS
from vkd_gen.training.command_line import run_command

STUDENTS = {
    "stable-diffusion-1": {name: vkd.REDUCTIONS[name] for name in ("bk-base", "bk-small", "bk-tiny")}
    | {"half width": vkd.Reduction(width=0.5)},
    "stable-diffusion-xl": {name: vkd.REDUCTIONS[name] for name in ("koala-1b", "koala-700m")},
}
STATE_BYTES = {"weights": 4, "gradients": 4, "DDP's buckets": 4, "AdamW": 8, "moving average": 4}
"""Of a student's parameter in a recipe, float32."""


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """The machine and the run that are assumed."""

    tflops: float = 989.0
    """Of one GPU in bf16, 10^12 operations a second, as its maker says: an H100's."""
    utilization: float = 0.3
    """Share of it that a step reaches. An assumption; `seconds` are in inverse proportion to it."""
    memory_gb: float = 80.0
    """Of one GPU."""
    bandwidth_gb: float = 50.0
    """At which one GPU exchanges gradients with the others, 10^9 bytes a second."""
    overhead: float = 1.12
    """Time of a step over that of the two forward passes, backward pass and optimizer. An assumption, above what
    step.py saw on a CPU."""
    global_batch_size: int = 256
    """Images per optimizer step over all GPUs."""
    steps: int = 50_000
    """Optimizer steps."""
    output: str = str(Path(__file__).parent / "results" / "scaling.json")
    """File for the numbers."""


class FlashAttention(torch.autograd.Function):
    """What flash attention keeps for a backward pass: queries, keys, values and the result; nothing is computed."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The result's shape."""
        result = torch.empty_like(query)
        context.save_for_backward(query, key, value, result)
        return result


def activation_bytes(unet: ModelMixin, *, trains: bool) -> int:
    """Bytes alive at most in a forward pass of one sample in bf16, counted on the meta device.

    With gradients that is what the backward pass needs, but for the float32 copies that autocast keeps of norms.
    """
    unet = unet.to(torch.bfloat16).requires_grad_(trains).train(trains)
    with torch.device("meta"):
        inputs = {
            name: value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in example_inputs(unet).items()
        }
        inputs["encoder_hidden_states"] = torch.empty(1, 77, unet.config.cross_attention_dim, dtype=torch.bfloat16)

    def attention(query: Tensor, key: Tensor, value: Tensor, **_options: Any) -> Tensor:
        return FlashAttention.apply(query, key, value)

    with mock.patch.object(F, "scaled_dot_product_attention", attention), LiveBytes() as live:
        prediction = unet(**inputs, return_dict=False)[0]
    assert prediction.requires_grad == trains
    return live.peak


def projector_bytes(student: ModelMixin, teacher: ModelMixin) -> int:
    """Of all projectors of `--layers all`: map, covariance, float64 sums, and a working copy of each in a refresh."""
    pairs = vkd.pair_layers(student, teacher)
    return sum(pair.student_channels * pair.teacher_channels * (4 + 4 + 8 + 16) for pair in pairs)


def count(teacher_name: str, student_name: str) -> dict[str, Any]:
    """What is counted, no matter on which machine."""
    config = TEACHERS[teacher_name]
    with torch.device("meta"):
        teacher = unet_class(config).from_config(config)
        student = vkd.build_student(teacher, STUDENTS[teacher_name][student_name])
    counted = {"teacher": teacher_name, "student": student_name, "projector_bytes": projector_bytes(student, teacher)}
    for name, unet in (("teacher", teacher), ("student", student)):
        counted[f"{name}_parameters"], counted[f"{name}_macs"] = count_parameters(unet), count_macs(unet)
    counted["teacher_activation_bytes"] = activation_bytes(teacher, trains=False)
    counted["student_activation_bytes"] = activation_bytes(student, trains=True)
    return counted


def compute(counted: dict[str, Any], config: ScalingConfig, num_gpus: int) -> dict[str, Any]:
    """Memory and time on so many GPUs."""
    fixed = counted["student_parameters"] * (sum(STATE_BYTES.values()) - (4 if num_gpus == 1 else 0))
    fixed += 2 * counted["teacher_parameters"] + counted["projector_bytes"]
    # bf16 copies of the weights that autocast keeps for a step
    fixed += 2 * counted["student_parameters"]
    per_image = counted["student_activation_bytes"] + counted["teacher_activation_bytes"]
    share = math.ceil(config.global_batch_size / num_gpus)
    # A tenth is left to the allocator and the libraries.
    fitting = int((0.9e9 * config.memory_gb - fixed) / per_image)
    passes = math.ceil(share / fitting) if fitting > 0 else 0
    micro_batch = math.ceil(share / passes) if passes else 0
    flops = 2 * (3 * counted["student_macs"] + counted["teacher_macs"]) * share
    busy = flops / (1e12 * config.tflops * config.utilization) * config.overhead
    backward = busy * 2 * counted["student_macs"] / (3 * counted["student_macs"] + counted["teacher_macs"])
    exchanged = 2 * (num_gpus - 1) / num_gpus * 4 * counted["student_parameters"]
    exchange = exchanged / (1e9 * config.bandwidth_gb)
    # Gradients are exchanged while the last backward pass goes on.
    seconds = busy + max(0.0, exchange - backward / max(passes, 1))
    return {
        "gpus": num_gpus,
        "fixed_gb": fixed / 1e9,
        "micro_batch": micro_batch,
        "passes": passes,
        "memory_gb": (fixed + micro_batch * per_image) / 1e9,
        "seconds_per_step": seconds,
        "exchange_seconds": exchange,
        "gpu_hours": seconds * config.steps * num_gpus / 3600,
        "hours": seconds * config.steps / 3600,
    }


def main(config: ScalingConfig) -> None:
    """Count, compute, print two tables in Markdown and write the numbers."""
    for name in ("tflops", "utilization", "memory_gb", "bandwidth_gb", "overhead", "global_batch_size", "steps"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"--{name} must be above 0 and finite, not {getattr(config, name)}")
    results = []
    print(
        "| teacher | student | parameters, M | GMACs, teacher + student | activations per image, GB | projectors, GB |"
    )
    print("|---|---|---|---|---|---|")
    for teacher, students in STUDENTS.items():
        for student in students:
            counted = count(teacher, student)
            results.append({**counted, "runs": [compute(counted, config, number) for number in (1, 8, 64)]})
            print(
                f"| {teacher} | {student} | {counted['teacher_parameters'] / 1e6:.0f} and "
                f"{counted['student_parameters'] / 1e6:.0f} | {counted['teacher_macs'] / 1e9:.0f} + "
                f"{counted['student_macs'] / 1e9:.0f} | {counted['student_activation_bytes'] / 1e9:.2f} + "
                f"{counted['teacher_activation_bytes'] / 1e9:.2f} | {counted['projector_bytes'] / 1e9:.3f} |",
                flush=True,
            )
    print(
        "\n| student | GPUs | without images, GB | images x passes | GB | s per step | s to exchange | hours "
        "| GPU hours |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for result in results:
        for run in result["runs"]:
            print(
                f"| {result['student']} | {run['gpus']} | {run['fixed_gb']:.1f} "
                f"| {run['micro_batch']} x {run['passes']} "
                f"| {run['memory_gb']:.1f} | {run['seconds_per_step']:.2f} | {run['exchange_seconds']:.3f} "
                f"| {run['hours']:.1f} | {run['gpu_hours']:.0f} |"
            )
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    protocol = {**json.loads(json.dumps(vars(config))), "state_bytes": STATE_BYTES, "environment": environment()}
    write_json(output, {"results": results, "protocol": protocol})


if __name__ == "__main__":
    run_command(main, ScalingConfig, __doc__)

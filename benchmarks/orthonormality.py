"""How far projectors get from orthonormal in a long training under bf16 autocast, at the widths of Stable Diffusion.

python benchmarks/orthonormality.py
python benchmarks/orthonormality.py --methods cayley matrix_exp --student_channels 320 --target_channels 640
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import vkd_gen as vkd
from vkd_gen.losses import feature_loss
from vkd_gen.projectors import orthonormality_error
from vkd_gen.provenance import environment, write_json
from vkd_gen.training.command_line import run_command

RESULTS = Path(__file__).parent / "results" / "orthonormality.json"


@dataclass(frozen=True, kw_only=True)
class OrthonormalityConfig:
    """Which projectors to train, and for how long."""

    methods: tuple[Literal["solved", "cayley", "matrix_exp"], ...] = ("solved",)
    """The learned ones take a factorisation or an exponential of wide x wide in float64 in every step."""
    student_channels: int = 640
    """Width of the student's rows."""
    target_channels: int = 1280
    """Width of the target rows."""
    num_steps: int = 1000
    """Optimizer steps."""
    num_rows: int = 64
    """Of the student and the target in a step."""
    learning_rate: float = 2e-3
    """Of AdamW, with weight decay for all it trains: the projector has to bear that too."""
    look_every_steps: int = 10
    """Steps between two measurements; solved projectors change at every tenth."""
    output: str = str(RESULTS)
    """File for the numbers; those of other methods and widths in it stay."""


def train(
    method: Literal["solved", "cayley", "matrix_exp"],
    student_channels: int,
    target_channels: int,
    *,
    num_steps: int,
    num_rows: int = 64,
    learning_rate: float = 2e-3,
    look_every_steps: int = 10,
) -> dict[str, Any]:
    """Train a linear student and a projector on rows that never repeat.

    The rows' scales fall by a factor of 100 over the directions, and with them the cross-covariance's by 10^4, as those
    of real features fall.

    Returns:
        `largest_error` and `last_error`, |P P^T - I| in float64, and `first_loss` and `last_loss`.

    Raises:
        ValueError: for sizes below 1.
    """
    if min(student_channels, target_channels, num_steps, num_rows, look_every_steps) < 1 or not learning_rate > 0:
        raise ValueError("widths, steps and rows must be at least 1, and the learning rate above 0")
    generator = torch.Generator().manual_seed(0)
    narrow = min(student_channels, target_channels)
    scales = torch.logspace(0, -2, narrow) * math.sqrt(narrow)
    to_student = torch.randn(narrow, student_channels, generator=generator) / narrow**0.5
    to_target = torch.randn(narrow, target_channels, generator=generator) / narrow**0.5
    torch.manual_seed(0)
    student = nn.Linear(student_channels, student_channels)
    projector = vkd.OrthogonalProjector(student_channels, target_channels, method=method).train()
    parameters = [*student.parameters(), *projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    errors, losses = [], []
    for step in range(1, num_steps + 1):
        sources = torch.randn(num_rows, narrow, generator=generator) * scales
        with torch.autocast("cpu", torch.bfloat16):
            rows = student(sources @ to_student)
            loss = feature_loss(*projector(rows[None], (sources @ to_target)[None]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        projector.after_step(step)
        losses.append(loss.detach())
        if step % look_every_steps == 0 or step in (1, num_steps):
            with torch.no_grad():
                errors.append(orthonormality_error(projector.matrix()))
    return {
        "largest_error": max(errors),
        "last_error": errors[-1],
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-1]),
    }


def main(config: OrthonormalityConfig) -> None:
    """Train with each method, show and write."""
    output = Path(config.output)
    results = json.loads(output.read_text())["results"] if output.exists() else {}
    for method in config.methods:
        found = train(
            method,
            config.student_channels,
            config.target_channels,
            num_steps=config.num_steps,
            num_rows=config.num_rows,
            learning_rate=config.learning_rate,
            look_every_steps=config.look_every_steps,
        )
        name = f"{method} {config.student_channels} -> {config.target_channels}"
        print(
            f"{name}: |P P^T - I| at most {found['largest_error']:.1e} in {config.num_steps:,} steps; "
            f"loss {found['first_loss']:.3f} to {found['last_loss']:.3f}",
            flush=True,
        )
        settings = {name: getattr(config, name) for name in ("num_steps", "num_rows", "learning_rate")}
        results[name] = {**found, **settings}
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, {"results": results, "protocol": {"precision": "bf16 autocast", **environment()}})


if __name__ == "__main__":
    run_command(main, OrthonormalityConfig, __doc__)

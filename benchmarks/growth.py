"""How time and memory of a training step grow with layer pairs, batch, resolution and width, drawn.

python benchmarks/growth.py
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter, ScalarFormatter

from vkd_gen.provenance import environment, write_json
from vkd_gen.training.command_line import run_command

HERE = Path(__file__).parent
BASE = {"num_pairs": 5, "batch_size": 16, "resolution": 16, "width": 32}
"""From which one thing at a time is changed; flags of step.py with the shape unet-32."""
SWEEPS = {
    "num_pairs": (0, 1, 2, 3, 4, 5),
    "batch_size": (8, 16, 32, 64),
    "resolution": (8, 16, 32),
    "width": (16, 32, 64),
}
LABELS = {
    "num_pairs": "layer pairs",
    "batch_size": "images per step",
    "resolution": "height and width of the samples",
    "width": "channels of the teacher's first stage",
}


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """How long to measure, and where to write."""

    rounds: int = 2
    """Rounds of 10 steps of each variant at each point; the first one more is not counted."""
    again: bool = False
    """Measure all points again; else those in the file are kept, as after an interruption."""
    output: str = str(HERE / "results" / "growth.json")
    """File for the numbers; the picture gets the same name."""


def measured(sizes: dict[str, int], rounds: int) -> dict[str, Any]:
    """What step.py says about b and d of these sizes, by the process' own computing time, one thread."""
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "step.json"
        flags = {"shape": "unet-32", "variants": "d", "clock": "cpu", "rounds": rounds, "output": output, **sizes}
        command = [sys.executable, str(HERE / "step.py")]
        command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            lines = (finished.stderr or finished.stdout).strip().splitlines()
            raise ValueError(f"step.py failed with {sizes}: {lines[-1] if lines else 'no message'}")
        found = json.loads(output.read_text())
    variants = found["variants"]
    return {
        **sizes,
        "ratio": variants["d"]["ratio_to_b"],
        "seconds": {name: variants[name]["seconds_per_step"]["median"] for name in "bd"},
        "peak_bytes": {name: variants[name]["peak_bytes_of_a_step"] for name in "bd"},
        "captured_bytes": found["protocol"]["captured_feature_bytes"],
        "parameters": found["protocol"]["parameters"],
    }


def exponent(sizes: list[float], values: list[float]) -> float:
    """Slope of the least-squares line through the logarithms: 1 where values grow in proportion."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def straightness(sizes: list[float], values: list[float]) -> float:
    """Squared correlation, 1 for points on a line."""
    return float(np.corrcoef(sizes, values)[0, 1] ** 2)


def fits(name: str, points: list[dict[str, Any]]) -> dict[str, float]:
    """How b and d grow along a sweep; of the pairs, which may be none, how near to a line of their features' bytes."""
    if name == "num_pairs":
        captured = [point["captured_bytes"] for point in points]
        return {
            # The floor is the same at all points, but the machine is not: what d takes is in units of b.
            "straightness_of_ratio": straightness(captured, [point["ratio"]["median"] for point in points]),
            "straightness_of_ratio_by_number": straightness(
                [point[name] for point in points], [point["ratio"]["median"] for point in points]
            ),
            "straightness_of_bytes_d": straightness(captured, [point["peak_bytes"]["d"] for point in points]),
        }
    sizes = [point[name] for point in points]
    return {
        f"exponent_of_{what}_{variant}": exponent(sizes, [point[key][variant] for point in points])
        for what, key in (("seconds", "seconds"), ("bytes", "peak_bytes"))
        for variant in "bd"
    }


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """A column for each sweep: seconds, ratio to the floor, memory."""
    figure, rows = plt.subplots(3, len(results), figsize=(15, 9), sharex="col", sharey="row", layout="constrained")
    colors = {"b": "#999999", "d": "#4477aa"}
    for column, (name, result) in enumerate(results.items()):
        points, found = result["points"], result["fits"]
        sizes = [point[name] for point in points]
        is_log = name != "num_pairs"
        for axes, key, scale in ((rows[0, column], "seconds", 1.0), (rows[2, column], "peak_bytes", 1e6)):
            what = "seconds" if key == "seconds" else "bytes"
            for variant in "bd":
                values = [point[key][variant] / scale for point in points]
                slope = f", exponent {found[f'exponent_of_{what}_{variant}']:.2f}" if is_log else ""
                axes.plot(sizes, values, "o-", color=colors[variant], label=variant + slope)
            if is_log:
                axes.set(xscale="log")
            axes.set(yscale="log")
            axes.grid(alpha=0.3, which="both")
            axes.legend(fontsize=9)
        if not is_log:  # on a floor that does not change
            bound = [(point["peak_bytes"]["b"] + point["captured_bytes"]) / 1e6 for point in points]
            rows[2, column].plot(sizes, bound, ":", color="black", label="b and captured features")
            rows[2, column].legend(fontsize=9)
        ratios = np.array([[point["ratio"][key] for key in ("low", "median", "high")] for point in points]).T
        rows[1, column].errorbar(
            sizes, ratios[1], yerr=[ratios[1] - ratios[0], ratios[2] - ratios[1]], fmt="o-", color=colors["d"]
        )
        rows[1, column].axhline(1, color="black", linewidth=0.8)
        rows[1, column].grid(alpha=0.3)
        rows[2, column].set(xlabel=LABELS[name], xticks=sizes)
        rows[2, column].xaxis.set_major_formatter(ScalarFormatter())
        rows[2, column].xaxis.set_minor_formatter(NullFormatter())
    for row, ticks in ((rows[0], (0.1, 0.2, 0.4)), (rows[2], (10, 20, 50, 100, 200))):
        row[0].set(yticks=ticks)
        row[0].yaxis.set_major_formatter(ScalarFormatter())
        row[0].yaxis.set_minor_formatter(NullFormatter())
    for axes, text in zip(rows[:, 0], ("computing time of a step, s", "d / b", "a step adds, MB"), strict=True):
        axes.set(ylabel=text)
    base = ", ".join(f"{BASE[name]} {label}" for name, label in LABELS.items())
    figure.suptitle(f"b: forward and backward passes and optimizer. d: the recipe's step.\nWhere not varied: {base}")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(config: GrowthConfig) -> None:
    """Measure point by point, fit, draw and write."""
    if config.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, not {config.rounds}")
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    points = [] if config.again or not output.exists() else json.loads(output.read_text())["points"]
    protocol = {"base": BASE, "shape": "unet-32", "clock": "cpu", "threads": 1, "environment": environment()}
    sweeps = {}
    for name, values in SWEEPS.items():
        along = []
        for value in values:
            sizes = {**BASE, name: value}
            found = [point for point in points if sizes.items() <= point.items()]
            if not found:
                found = [{**measured(sizes, config.rounds), "rounds": config.rounds}]
                points += found
                write_json(output, {"points": points, "fits": {}, "protocol": protocol})
            point = found[0]
            along.append(point)
            print(
                f"{name} {value}: b {point['seconds']['b']:.3f} s, d / b {point['ratio']['median']:.3f}, "
                f"b {point['peak_bytes']['b'] / 1e6:.1f} MB, d {point['peak_bytes']['d'] / 1e6:.1f} MB",
                flush=True,
            )
        sweeps[name] = {"points": along, "fits": fits(name, along)}
        print(json.dumps(sweeps[name]["fits"]))
    all_fits = {name: sweep["fits"] for name, sweep in sweeps.items()}
    write_json(output, {"points": points, "fits": all_fits, "protocol": protocol})
    plot(sweeps, output.with_suffix(".png"))
    print(f"written to {output} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    run_command(main, GrowthConfig, __doc__)

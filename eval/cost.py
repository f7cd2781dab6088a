"""What UNets cost: parameters, multiply-accumulates, memory; and, measured, time and peak memory of a forward pass.

python eval/cost.py recipes/assets/digits-teacher runs/digits --measure
python eval/cost.py TEXT_PIPELINE runs/half-sd --whole_pipeline
python eval/cost.py stable-diffusion-1 --students bk-base bk-small bk-tiny
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from vkd_gen.cli import announce, check_at_least, check_output_file, repository_path, run_command
from vkd_gen.evaluation.tables import print_columns

# What takes seconds to load, torch and all that needs it, is imported in the functions: flags are read before.
from vkd_gen.reductions import REDUCTIONS


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """What to count. Configurations are enough: no weights are loaded, and without --measure none are made."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Each a folder of a UNet, of a pipeline or of a recipe's run, a config.json, a hub id, or one of
    stable-diffusion-1, stable-diffusion-2, stable-diffusion-xl and ddpm-cifar10-32. The first is the teacher."""
    students: tuple[str, ...] = ()
    """Students of the first model to add, by the names that train_student_unet.py --student takes: bk-base, ..."""
    sample_size: int | None = None
    """Side of the samples that go in, as the UNet sees them; by default what its configuration says."""
    measure: bool = False
    """Also time a forward pass and take its peak memory, with random weights, all models in turns."""
    batch_size: int = 1
    """Samples at a time when measured."""
    whole_pipeline: bool = False
    """Of text pipelines with their weights: also time a whole image, a line each for text encoder, UNet and VAE."""
    num_inference_steps: int = 25
    """Steps of --whole_pipeline."""
    guidance_scale: float | None = None
    """Guidance of --whole_pipeline; by default each pipeline's own."""
    output: str | None = None
    """File to write the numbers to, as JSON."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if not self.models:
            raise ValueError("name at least one model")
        unknown = set(self.students) - set(REDUCTIONS)
        if unknown:
            raise ValueError(f"there is no student {unknown.pop()!r}; choose among {', '.join(REDUCTIONS)}")
        if self.batch_size < 1 or (self.sample_size is not None and self.sample_size < 1):
            raise ValueError("--batch_size and --sample_size must be at least 1")
        check_at_least(self, {"num_inference_steps": 1, "guidance_scale": 1})
        if self.whole_pipeline and (self.students or self.sample_size is not None):
            raise ValueError("--whole_pipeline times pipelines as they are; leave --students and --sample_size out")


def read_configs(config: CostConfig) -> dict[str, dict[str, Any]]:
    """Name -> configuration of each UNet, students of the first model behind the others."""
    from vkd_gen.families import reduce_config
    from vkd_gen.training.unets import read_unet_config

    configs = {}
    for name in config.models:
        source = repository_path(name, __file__)
        run = Path(source) / "pipeline"  # of a recipe
        configs[name] = read_unet_config(str(run) if run.is_dir() else source, "model")
    teacher = next(iter(configs.values()))
    configs |= {name: reduce_config(teacher, REDUCTIONS[name]) for name in config.students}
    size = {} if config.sample_size is None else {"sample_size": config.sample_size}
    return {name: {**entries, **size} for name, entries in configs.items()}


def main(config: CostConfig) -> None:
    """Count, measure if asked for, and print one table."""
    if config.output:
        check_output_file(config.output)
    announce(f"the cost of {', '.join((*config.models, *config.students))}")

    import torch
    from accelerate import PartialState

    from vkd_gen.evaluation.cost import count_macs, count_parameters, forward_costs
    from vkd_gen.families import build_student, published_cost
    from vkd_gen.provenance import environment, write_json
    from vkd_gen.training.unets import check_memory, unet_without_weights

    torch.set_float32_matmul_precision("high")
    parts = whole_costs(config) if config.whole_pipeline else {}
    configs = read_configs(config)
    rows: dict[str, dict[str, Any]] = {}
    for name, entries in configs.items():
        unet = unet_without_weights(entries, name)
        if config.measure:
            check_memory(unet, name)
        parameters, published = count_parameters(unet), published_cost(entries)
        rows[name] = {"parameters": parameters, "macs": count_macs(unet), "weights_float32_bytes": parameters * 4}
        if published is not None:
            rows[name] |= {"published_parameters": published.parameters, "published_macs": published.macs}
            rows[name] |= {"published_source": published.source}
    if config.measure:
        device = PartialState().device
        unets = {name: build_student(entries).to(device).eval() for name, entries in configs.items()}
        for name, costs in forward_costs(unets, batch_size=config.batch_size).items():
            rows[name] |= costs
    if not PartialState().is_main_process:
        return
    print_costs(rows)
    if parts:
        print_parts(parts)
    if config.output:
        protocol = {"batch_size": config.batch_size, "environment": environment()}
        if parts:
            protocol |= {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
            rows = {name: {**row, "parts": parts[name]} for name, row in rows.items()}
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(config.output), {"rows": rows, "protocol": protocol})


def whole_costs(config: CostConfig) -> dict[str, dict[str, dict[str, Any]]]:
    """What the parts of text pipelines cost; see `pipeline_costs`."""
    from accelerate import PartialState

    from vkd_gen.evaluation.pipeline_cost import pipeline_costs
    from vkd_gen.models import Model
    from vkd_gen.pipelines import load_pipeline

    models = {}
    for name in config.models:
        models[name] = Model(load_pipeline(repository_path(name, __file__)))
        if not models[name].takes_prompts:
            raise ValueError(f"{name} is no text pipeline, which --whole_pipeline is for; --measure times its UNet")
        models[name].pipeline.to(PartialState().device)
    prompts = ["a photograph of an astronaut on a horse"] * config.batch_size
    options = {"guidance_scale": config.guidance_scale, "num_inference_steps": config.num_inference_steps}
    return pipeline_costs(models, prompts, **options)


def print_parts(parts: dict[str, dict[str, dict[str, Any]]]) -> None:
    """A line per pipeline and part."""
    rows = {f"{name}: {part}": row for name, found in parts.items() for part, row in found.items()}
    titles = {"parameters": "parameters", "calls": "calls per batch", "ms_per_call": "ms per call"}
    table = []
    for key, title in {**titles, "ms_per_image": "ms per image"}.items():
        form = "{:,}" if key in ("parameters", "calls") else "{:,.2f}"
        table.append((title, [form.format(row[key]) if key in row else "-" for row in rows.values()]))
    print_columns(list(rows), table)


MEBIBYTES = ("weights_float32_bytes", "peak_memory_bytes")
TITLES = {
    "parameters": "parameters",
    "published_parameters": "published",
    "macs": "MACs per step",
    "published_macs": "published",
    "weights_float32_bytes": "weights, float32, MiB",
    "ms_per_image_and_step": "ms per image and step",
    "peak_memory_bytes": "peak memory, MiB",
}


def print_costs(rows: dict[str, dict[str, Any]]) -> None:
    """A line per model: each number with its share of the first model's, and what is published about it."""
    first = next(iter(rows.values()))
    columns = [name for name in TITLES if any(row.get(name) is not None for row in rows.values())]
    table: list[tuple[str, list[str]]] = []
    for name in columns:
        cells: list[str] = []
        for row in rows.values():
            value = row.get(name)
            if value is None:
                cells.append("-")
                continue
            value = value / 2**20 if name in MEBIBYTES else value
            text = f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
            share = "" if row is first or name.startswith("published") else f"  ({row[name] / first[name]:.1%})"
            cells.append(text + share)
        table.append((TITLES[name], cells))
    print_columns(list(rows), table)
    for source in dict.fromkeys(row["published_source"] for row in rows.values() if "published_source" in row):
        print(f"published: {source}")


if __name__ == "__main__":
    run_command(main, CostConfig, __doc__)

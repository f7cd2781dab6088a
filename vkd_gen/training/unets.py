"""UNets from folders, files and the hub: safetensors only, no code, and sizes checked before anything is allocated."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, ModelMixin, UNet2DModel

from vkd_gen.families import REDUCTIONS, TEACHERS
from vkd_gen.families.blocks import check_blocks
from vkd_gen.families.classes import complete_config, network_class
from vkd_gen.hub import hub_folder, model_files, split_revision
from vkd_gen.limits import check_sizes
from vkd_gen.loading import check_betas, check_memory, load_model, read_json
from vkd_gen.pipelines import num_classes_of
from vkd_gen.text import reason

CONFIGS = (
    "config.json",
    "unet/config.json",
    "transformer/config.json",
    "scheduler_config.json",
    "scheduler/scheduler_config.json",
)
"""What a UNet and its schedule are known by, in a repository of the hub."""

SLOTS = ("unet", "transformer")
"""Folders of a pipeline that hold a denoiser."""
CONDITIONS = (
    *("in_channels", "out_channels", "num_class_embeds", "class_embed_type", "cross_attention_dim"),
    *("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
)
"""What student and teacher have in common, since both are asked the same."""
CONDITIONS_OF_TRANSFORMERS = ("in_channels", "num_embeds_ada_norm", "sample_size")


class LoadedTeacher(NamedTuple):
    """A UNet on the CPU (or the meta device), its noise schedule, and where the schedule is from."""

    unet: UNet2DModel
    noise_scheduler: DDPMScheduler
    schedule_origin: str


def load_teacher(source: str, *, without_weights: bool = False) -> LoadedTeacher:
    """Load a UNet and its noise schedule from a pipeline or model folder, or from the Hugging Face hub.

    Args:
        source: folder or hub id (`ID@REVISION` for a certain commit, tag or branch); the UNet lies under `unet/` or at
            the root, the scheduler under `scheduler/`, beside the UNet's folder or at the root. Without a scheduler the
            DDPM default (linear, 1,000 steps, epsilon) is taken, and `schedule_origin` says so.
        without_weights: read the configuration alone, and leave the UNet on the meta device. `source` may then also be
            a config.json or one of `TEACHERS`, and the UNet a `UNet2DConditionModel`.

    Raises:
        ValueError: in one line: nothing there, only pickled weights, another kind of model, absurd sizes.
    """
    if without_weights:
        unet = unet_without_weights(read_unet_config(source, "teacher"), source)
    else:
        if Path(source).is_file():
            raise ValueError(f"the teacher {source} is a file; name the folder of a diffusers pipeline or UNet")
        if (kind := network_class(read_unet_config(source, "teacher"))) is not UNet2DModel:
            raise ValueError(
                f"{source} holds a {kind.__name__} alone; its pipeline, which encodes images and prompts, is "
                "needed too: name the folder or hub id of that"
            )
        unet = load_unet(source, "teacher")
    noise_scheduler, origin = _load_scheduler(source)
    return LoadedTeacher(_check(unet, source) if isinstance(unet, UNet2DModel) else unet, noise_scheduler, origin)


def load_unet(source: str, role: str = "student") -> ModelMixin:
    """Load a UNet with its weights from a pipeline or model folder, or from the Hugging Face hub.

    Args:
        source: folder or hub id; see `load_teacher`.
        role: what it is wanted as, for messages.
    """
    config = read_unet_config(source, role)
    check_memory(unet_without_weights(config, source), source)
    place = _place(source, role)
    if not Path(source).exists():  # now that it is known to be a UNet that is wanted
        _from_hub(source, role, model_files(f"{place.name}/" if place.name in SLOTS else ""))
    try:
        return load_model(network_class(config), place)
    except Exception as error:  # damaged weights, and configurations of other models, raise all kinds of errors
        raise ValueError(f"cannot load the UNet in {place}: {reason(error, 1000)}") from error


def read_unet_config(source: str, role: str = "student") -> dict[str, Any]:
    """The configuration of a UNet; weights need not be there.

    Args:
        source: a config.json, the folder of a pipeline or UNet, one of `TEACHERS`, or a hub id.
        role: what it is wanted as, for messages.

    Raises:
        ValueError: in one line: nothing there, no JSON, no UNet.
    """
    if source in TEACHERS and not Path(source).exists():
        return dict(TEACHERS[source])
    path = Path(source)
    if not path.is_file():
        path = _place(source, role) / "config.json"
    try:
        config = read_json(path)
    except ValueError as error:
        raise ValueError(f"the {role} {path} is no config.json of a UNet: {error}") from error
    if network_class(config) is not DiTTransformer2DModel and "block_out_channels" not in config:
        raise ValueError(f"the {role} {path} is no config.json of a UNet: no block_out_channels")
    return config


def read_student_config(source: str, teacher: ModelMixin) -> dict[str, Any]:
    """The configuration of a student from elsewhere, complete, with the teacher's sample size.

    Args:
        source: a config.json, the folder of a pipeline or UNet, or a hub id.
        teacher: that it is to learn from; may be on the meta device.

    Raises:
        ValueError: in one line: nothing there, absurd sizes, or another kind of samples or conditions.
    """
    if not Path(source).exists() and "/" not in source:
        raise ValueError(
            f"--student {source} is neither one of {', '.join(REDUCTIONS)} nor a file, a folder or a hub id"
        )
    student = unet_without_weights(read_unet_config(source), source)
    config, is_transformer = student.config, isinstance(teacher, DiTTransformer2DModel)
    if is_transformer != isinstance(student, DiTTransformer2DModel):
        raise ValueError(
            f"the student {source} is a {type(student).__name__} and the teacher a {type(teacher).__name__}: students "
            "of another architecture come with a later version"
        )
    for entry in CONDITIONS_OF_TRANSFORMERS if is_transformer else CONDITIONS:
        if config.get(entry) != teacher.config.get(entry):
            raise ValueError(
                f"the student {source} has {entry} {config.get(entry)} and the teacher {teacher.config.get(entry)}"
            )
    return {**config, "sample_size": teacher.config.sample_size}


def _place(source: str, role: str) -> Path:
    """The folder of a UNet's config.json, in a folder here or in the hub's cache, where it is downloaded to."""
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists() or source.startswith((".", "/", "~")) or split_revision(source)[0].count("/") != 1:
            raise ValueError(f"there is no {role} folder {source}")
        folder = _from_hub(source, role, CONFIGS)
    elif (folder / "pipeline" / "model_index.json").is_file() and not (folder / "unet").exists():
        folder = folder / "pipeline"  # of a recipe's run
    for path in (folder / "unet", folder / "transformer", folder):
        if (path / "config.json").exists():
            return path
    raise ValueError(f"{folder} holds no UNet: neither unet/config.json nor config.json is there")


def _from_hub(source: str, role: str, files: Sequence[str]) -> Path:
    try:
        return hub_folder(source, files)
    except ValueError as error:
        raise ValueError(f"there is no {role} folder {source}, and the hub did not give it: {error}") from error


def unet_without_weights(config: Mapping[str, Any], source: str) -> ModelMixin:
    """The UNet of a configuration on the meta device, which takes no memory at any size.

    Args:
        config: as a config.json holds it.
        source: what it is of, for messages.

    Raises:
        ValueError: for sizes that no UNet has, and what diffusers does not take.
    """
    config = complete_config(config) | {"_class_name": network_class(config).__name__}
    check_sizes(config, source)
    _check_kinds(config, source)
    if config["_class_name"] == DiTTransformer2DModel.__name__:
        check_blocks(config)
    try:
        with torch.device("meta"):
            kind = network_class(config)
            return kind.from_config({name: value for name, value in config.items() if not name.startswith("_")})
    except Exception as error:  # diffusers checks little, and what it does not check fails in all kinds of ways
        raise ValueError(f"{source} is no UNet that diffusers can build: {reason(error, 300)}") from error


def _check_kinds(config: Mapping[str, Any], source: str) -> None:
    """What diffusers builds a UNet by without a look at it, and fails on later."""
    defaults = complete_config({"_class_name": config["_class_name"]})
    for entry, default in defaults.items():
        if isinstance(default, int | float) and isinstance(config[entry], str):
            raise ValueError(f"{source} is no UNet that diffusers can build: {entry} is {config[entry]!r}, no number")
    size = config["sample_size"]
    sides = list(size) if isinstance(size, list | tuple) else [size]
    is_size = len(sides) in (1, 2) and all(isinstance(side, int) and side > 0 for side in sides)
    if size is not None and not is_size:
        raise ValueError(f"{source} is no UNet that diffusers can build: sample_size is {str(size)[:80]}, no size")


def _load_scheduler(source: str) -> tuple[DDPMScheduler, str]:
    path = Path(source)
    if source in TEACHERS and not path.exists():
        return DDPMScheduler(), "diffusers' default; the teacher comes without one"
    place = path.parent if path.is_file() else _place(source, "teacher")
    # Beneath a pipeline's folder, beside a UNet's, or in the same folder.
    root = place.parent if place.name in SLOTS else place
    for folder in dict.fromkeys((root / "scheduler", root, place, place.resolve().parent / "scheduler")):
        file = folder / "scheduler_config.json"
        if file.exists():
            return training_schedule(read_json(file), str(folder)), str(folder) if path.exists() else source
    return DDPMScheduler(), "diffusers' default; the teacher comes without one"


def training_schedule(config: Mapping[str, Any], source: str) -> DDPMScheduler:
    """The schedule that a model was trained on, from the configuration of its sampler, such as PNDM's or Euler's.

    Raises:
        ValueError: in one line, for a sampler without betas, and betas that are no schedule.
    """
    if "beta_schedule" not in config and "trained_betas" not in config:
        raise ValueError(
            f"{source} holds a {config.get('_class_name', 'scheduler')}, which is not a schedule of betas; this recipe "
            "distils models of the DDPM family"
        )
    check_sizes(config, source, "schedule")
    try:
        scheduler = DDPMScheduler.from_config(config)
    except Exception as error:  # diffusers checks little, and what it does not check fails in all kinds of ways
        raise ValueError(f"{source} holds no schedule that diffusers can build: {reason(error)}") from error
    return check_betas(scheduler, source)


def _check(unet: UNet2DModel, source: str) -> UNet2DModel:
    config = unet.config
    if not isinstance(config.sample_size, int | None):
        height, width = config.sample_size
        if height != width:
            raise ValueError(f"{source} makes images of {height} x {width} pixels; this recipe distils square ones")
        unet.register_to_config(sample_size=height)
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ValueError(f"{source} holds a {config['_class_name']}; this recipe distils a UNet2DModel")
    if config.class_embed_type is not None:
        raise ValueError(
            f"{source} has class_embed_type {config.class_embed_type!r}; this recipe distils UNets without classes, or "
            "with num_class_embeds alone"
        )
    num_classes = num_classes_of(unet)
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"{source} has num_class_embeds {num_classes + 1}; the last one means no class, so 2 is least")
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"{source} maps {config.in_channels} to {config.out_channels} channels; a UNet that also predicts a "
            "variance cannot be distilled here"
        )
    return unet

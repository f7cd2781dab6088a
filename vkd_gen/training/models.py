"""UNets from folders, files and the hub: safetensors only, no code, and sizes checked before anything is allocated."""

import json
import math
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import load
from diffusers import DDPMScheduler, ModelMixin, UNet2DModel
from safetensors import safe_open

from vkd_gen.limits import check_sizes
from vkd_gen.pipelines import num_classes_of
from vkd_gen.provenance import split_revision
from vkd_gen.students import REDUCTIONS, TEACHERS
from vkd_gen.students.build import complete_config, unet_class

WEIGHTS = "diffusion_pytorch_model"


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
        unet = load_unet(source, "teacher")
    noise_scheduler, origin = _load_scheduler(source)
    return LoadedTeacher(_check(unet, source) if isinstance(unet, UNet2DModel) else unet, noise_scheduler, origin)


def load_unet(source: str, role: str = "student") -> UNet2DModel:
    """Load a `UNet2DModel` with its weights from a pipeline or model folder, or from the Hugging Face hub.

    Args:
        source: folder or hub id; see `load_teacher`.
        role: what it is wanted as, for messages.
    """
    config = read_unet_config(source, role)
    if unet_class(config) is not UNet2DModel:
        raise ValueError(
            f"{source} holds a {unet_class(config).__name__}; this recipe distils a UNet2DModel. --dry_run shows the "
            "student, its cost and its pairs; training it needs another recipe, with text and latents"
        )
    needed = unet_without_weights(config, source)
    check_memory(needed, source)
    folder = Path(source)
    if not folder.is_dir():
        return _from_hub(source, role)
    unet_folder = _unet_folder(folder)
    if not list(unet_folder.glob(f"{WEIGHTS}*.safetensors*")):
        pickles = list(unet_folder.glob("*.bin")) + list(unet_folder.glob("*.pt"))
        if pickles:
            raise ValueError(
                f"{unet_folder} holds pickled weights only ({pickles[0].name}), which can run code when loaded; if you "
                "trust them, convert them once: UNet2DModel.from_pretrained(FOLDER, use_safetensors=False)"
                ".save_pretrained(NEW_FOLDER)"
            )
        raise ValueError(f"{unet_folder} holds no weights: {WEIGHTS}.safetensors is not there")
    try:
        missing = sum(value.numel() for value in needed.state_dict().values()) - _count_stored(unet_folder)
        if missing > 0:
            raise ValueError(f"its weights are {missing:,} numbers short of what its config.json asks for")
        return UNet2DModel.from_pretrained(unet_folder, use_safetensors=True, low_cpu_mem_usage=False)
    except Exception as error:  # damaged weights, and configurations of other models, raise all kinds of errors
        raise ValueError(f"cannot load the UNet in {unet_folder}: {' '.join(str(error).split())[:300]}") from error


def read_unet_config(source: str, role: str = "student") -> dict[str, Any]:
    """The configuration of a UNet; weights need not be there.

    Args:
        source: a config.json, the folder of a pipeline or UNet, one of `TEACHERS`, or a hub id.
        role: what it is wanted as, for messages.

    Raises:
        ValueError: in one line: nothing there, no JSON, no UNet.
    """
    path = Path(source)
    if path.is_dir():
        path = _unet_folder(path) / "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the {role} {path} is a file, but no config.json of a UNet: {error}") from error
        if not isinstance(config, dict) or "block_out_channels" not in config:
            raise ValueError(f"the {role} {path} is a file, but no config.json of a UNet: no block_out_channels")
    elif source in TEACHERS:
        return dict(TEACHERS[source])
    else:
        if source.startswith((".", "/", "~")) or split_revision(source)[0].count("/") != 1:
            raise ValueError(f"there is no {role} folder {source}")
        config = _from_hub(source, role, config_only=True)
    unet_class(config)
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
    config = unet_without_weights(read_unet_config(source), source).config
    for entry in ("in_channels", "out_channels", "num_class_embeds", "class_embed_type", "cross_attention_dim"):
        if config.get(entry) != teacher.config.get(entry):
            raise ValueError(
                f"the student {source} has {entry} {config.get(entry)} and the teacher {teacher.config.get(entry)}"
            )
    return {**config, "sample_size": teacher.config.sample_size}


def _from_hub(source: str, role: str, *, config_only: bool = False) -> Any:
    repository, revision = split_revision(source)

    def load(subfolder: str | None) -> Any:
        if config_only:
            return UNet2DModel.load_config(repository, subfolder=subfolder, revision=revision)
        return UNet2DModel.from_pretrained(repository, subfolder=subfolder, revision=revision, use_safetensors=True)

    try:
        try:
            return load("unet")
        except OSError:  # no such subfolder: older repositories keep everything at the root
            return load(None)
    except Exception as error:  # offline, missing, gated and malformed each have a class of their own
        reason = " ".join(str(error).split())
        raise ValueError(f"there is no {role} folder {source}, and the hub did not give it: {reason[:200]}") from error


def _unet_folder(folder: Path) -> Path:
    for path in (folder / "unet", folder):
        if (path / "config.json").is_file():
            return path
    raise ValueError(f"{folder} holds no UNet: neither unet/config.json nor config.json is there")


def unet_without_weights(config: Mapping[str, Any], source: str) -> ModelMixin:
    """The UNet of a configuration on the meta device, which takes no memory at any size.

    Args:
        config: as a config.json holds it.
        source: what it is of, for messages.

    Raises:
        ValueError: for sizes that no UNet has, and what diffusers does not take.
    """
    config = complete_config(config) | {"_class_name": unet_class(config).__name__}
    check_sizes(config, source)
    _check_kinds(config, source)
    try:
        with torch.device("meta"):
            kind = unet_class(config)
            return kind.from_config({name: value for name, value in config.items() if not name.startswith("_")})
    except Exception as error:  # diffusers checks little, and what it does not check fails in all kinds of ways
        reason = " ".join(str(error).split())
        raise ValueError(f"{source} is no UNet that diffusers can build: {reason[:300]}") from error


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


def check_memory(unet: ModelMixin, source: str) -> None:
    """Refuse a UNet whose weights, in float32, are larger than this machine's memory."""
    needed = 4 * sum(parameter.numel() for parameter in unet.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"the weights of {source} would take {needed / 1e9:,.0f} GB; this machine has {memory / 1e9:,.0f} GB"
        )


def _count_stored(folder: Path) -> int:
    """Numbers in the weights of a folder, from the headers of its files alone."""
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    names = {f"{WEIGHTS}.safetensors"}
    if index.is_file():
        names = {Path(name).name for name in json.loads(index.read_text())["weight_map"].values()}
    count = 0
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            count += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return count


def _load_scheduler(source: str) -> tuple[DDPMScheduler, str]:
    path = Path(source)
    if path.exists():
        unet_folder = _unet_folder(path) if path.is_dir() else path.parent
        folders = (path / "scheduler", path) if path.is_dir() else (path.parent,)
        for folder in (*folders, unet_folder.resolve().parent / "scheduler"):
            if (folder / "scheduler_config.json").is_file():
                try:
                    config = DDPMScheduler.load_config(folder)
                except (OSError, ValueError, RecursionError) as error:
                    raise ValueError(f"cannot read {folder / 'scheduler_config.json'}: it is no JSON") from error
                return _scheduler(config, str(folder)), str(folder)
    if path.exists() or source in TEACHERS:
        return DDPMScheduler(), "diffusers' default; the teacher comes without one"
    repository, revision = split_revision(source)
    try:
        try:
            config = DDPMScheduler.load_config(repository, subfolder="scheduler", revision=revision)
        except OSError:
            config = DDPMScheduler.load_config(repository, revision=revision)
    except Exception as error:  # as above
        reason = " ".join(str(error).split())
        raise ValueError(f"the hub did not give a schedule for {source}: {reason[:200]}") from error
    return _scheduler(config, source), source


def _scheduler(config: Mapping[str, Any], source: str) -> DDPMScheduler:
    if not isinstance(config, Mapping):
        raise ValueError(f"{source} holds no schedule: its scheduler_config.json is not a JSON object")
    if "beta_schedule" not in config and "trained_betas" not in config:
        raise ValueError(
            f"{source} holds a {config.get('_class_name', 'scheduler')}, which is not a schedule of betas; this recipe "
            "distils models of the DDPM family"
        )
    check_sizes(config, source, "schedule")
    try:
        scheduler = DDPMScheduler.from_config(config)
    except Exception as error:  # diffusers checks little, and what it does not check fails in all kinds of ways
        reason = " ".join(str(error).split())
        raise ValueError(f"{source} holds no schedule that diffusers can build: {reason[:200]}") from error
    steps, betas = scheduler.config.num_train_timesteps, scheduler.betas
    if not isinstance(steps, int) or steps < 1 or len(betas) != steps or not ((betas >= 0) & (betas <= 1)).all():
        raise ValueError(
            f"{source} holds no schedule of noise: it has {len(betas)} betas for {steps} steps, which must be as many, "
            "1 or more, and each from 0 to 1"
        )
    return scheduler


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


def check_checkpoint(folder: Path | None) -> None:
    """Refuse a checkpoint with a file that would run code, or cannot be read, before anything of it is loaded.

    Beside the weights there are pickles: optimizer.bin, scaler.pt, random_states_*.pkl, and the loop's training.pt and
    process-*.pt; Accelerate also keeps custom_checkpoint_*.pkl of what is registered with it, which it reads with
    `weights_only=False`, and goes on without the random states where it cannot read them. Here all are read with
    `weights_only=True` first; values stay on disk. Folders of shards (FSDP, DeepSpeed) are refused: their own loaders
    unpickle whatever they hold.

    Args:
        folder: of the checkpoint; None for a run that starts anew.

    Raises:
        ValueError: in one line, naming the file.
    """
    if folder is None:
        return
    shards = sorted(path for path in folder.iterdir() if path.is_dir())
    if shards:
        raise ValueError(
            f"the checkpoint holds a folder, {shards[0]}; shards (FSDP, DeepSpeed) are unpickled by their own loaders "
            "and not loaded here"
        )
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".pkl", ".pt", ".pth")):
        try:
            with warnings.catch_warnings(action="ignore"):  # of pickles of another kind than its own
                load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # damaged, truncated and executable files each have a class of their own
            is_code = isinstance(error, pickle.UnpicklingError) and "Weights only load failed" in str(error)
            reason = "it holds more than numbers, and could run code" if is_code else str(error).splitlines()[0][:200]
            raise ValueError(
                f"the checkpoint's file {path} is not loaded: {reason}; resume from another one"
            ) from error

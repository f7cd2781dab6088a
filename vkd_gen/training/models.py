"""Teachers from folders and the hub, safetensors only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import DDPMScheduler, UNet2DModel

from vkd_gen.pipelines import num_classes_of

WEIGHTS = "diffusion_pytorch_model"


class LoadedTeacher(NamedTuple):
    """A UNet on the CPU, its noise schedule, and where the schedule is from."""

    unet: UNet2DModel
    noise_scheduler: DDPMScheduler
    schedule_origin: str


def load_teacher(source: str) -> LoadedTeacher:
    """Load a UNet and its noise schedule from a pipeline or model folder, or from the Hugging Face hub.

    Args:
        source: folder or hub id; the UNet lies under `unet/` or at the root, the scheduler under `scheduler/`, beside
            the UNet's folder or at the root. Without a scheduler the DDPM default (linear, 1,000 steps, epsilon) is
            taken, and `schedule_origin` says so.

    Raises:
        ValueError: in one line: nothing there, only pickled weights, another kind of model.
    """
    folder = Path(source)
    if folder.is_dir():
        return _load_folder(folder)
    if folder.is_file():
        raise ValueError(f"the teacher {source} is a file; name the folder of a diffusers pipeline or UNet")
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError(f"there is no teacher folder {source}")
    try:
        scheduler_folder: str | None = "scheduler"
        try:
            unet = UNet2DModel.from_pretrained(source, subfolder="unet", use_safetensors=True)
        except OSError:  # no such subfolder: older repositories keep everything at the root
            unet = UNet2DModel.from_pretrained(source, use_safetensors=True)
            scheduler_folder = None
        scheduler_config = DDPMScheduler.load_config(source, subfolder=scheduler_folder)
    except Exception as error:  # offline, missing, gated and malformed each have a class of their own
        reason = " ".join(str(error).split())
        raise ValueError(f"there is no teacher folder {source}, and the hub did not give it: {reason[:200]}") from error
    return LoadedTeacher(_check(unet, source), _scheduler(scheduler_config, source), source)


def _load_folder(folder: Path) -> LoadedTeacher:
    unet_folder = next((path for path in (folder / "unet", folder) if (path / "config.json").is_file()), None)
    if unet_folder is None:
        raise ValueError(f"{folder} holds no UNet: neither unet/config.json nor config.json is there")
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
        unet = UNet2DModel.from_pretrained(unet_folder, use_safetensors=True, low_cpu_mem_usage=False)
    except Exception as error:  # damaged weights, and configurations of other models, raise all kinds of errors
        raise ValueError(f"cannot load the UNet in {unet_folder}: {' '.join(str(error).split())[:300]}") from error
    beside = unet_folder.resolve().parent / "scheduler"
    for path in (folder / "scheduler", folder, beside):
        if (path / "scheduler_config.json").is_file():
            scheduler = _scheduler(DDPMScheduler.load_config(path), str(path))
            return LoadedTeacher(_check(unet, str(folder)), scheduler, str(path))
    return LoadedTeacher(
        _check(unet, str(folder)), DDPMScheduler(), "diffusers' default; the teacher comes without one"
    )


def _scheduler(config: Mapping[str, Any], source: str) -> DDPMScheduler:
    if "beta_schedule" not in config and "trained_betas" not in config:
        raise ValueError(
            f"{source} holds a {config.get('_class_name', 'scheduler')}, which is not a schedule of betas; this recipe "
            "distils models of the DDPM family"
        )
    return DDPMScheduler.from_config(config)


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

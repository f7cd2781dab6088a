"""Teachers from folders and the hub, safetensors only."""

from pathlib import Path

from diffusers import DDPMScheduler, UNet2DModel

WEIGHTS = "diffusion_pytorch_model"


def load_teacher(source: str) -> tuple[UNet2DModel, DDPMScheduler]:
    """Load a UNet and its noise schedule from a pipeline or model folder, or from the Hugging Face hub.

    Args:
        source: folder or hub id; the UNet lies under `unet/` or at the root, the scheduler under `scheduler/` or at
            the root. Without a scheduler the DDPM default (linear, 1,000 steps, epsilon) is taken.

    Returns:
        The UNet on the CPU, and the schedule as a DDPMScheduler.

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
        scheduler = DDPMScheduler.from_pretrained(source, subfolder=scheduler_folder)
    except Exception as error:  # offline, missing, gated and malformed each have a class of their own
        reason = " ".join(str(error).split())
        raise ValueError(f"there is no teacher folder {source}, and the hub did not give it: {reason[:200]}") from error
    return _check(unet, source), scheduler


def _load_folder(folder: Path) -> tuple[UNet2DModel, DDPMScheduler]:
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
    scheduler_folder = next(
        (path for path in (folder / "scheduler", folder) if (path / "scheduler_config.json").is_file()), None
    )
    scheduler = DDPMScheduler.from_pretrained(scheduler_folder) if scheduler_folder else DDPMScheduler()
    return _check(unet, str(folder)), scheduler


def _check(unet: UNet2DModel, source: str) -> UNet2DModel:
    config = unet.config
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ValueError(f"{source} holds a {config['_class_name']}; this recipe distils a UNet2DModel")
    if config.num_class_embeds is not None or config.class_embed_type is not None:
        raise ValueError(f"{source} is a class-conditional UNet; this recipe distils unconditional ones")
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"{source} maps {config.in_channels} to {config.out_channels} channels; a UNet that also predicts a "
            "variance cannot be distilled here"
        )
    return unet

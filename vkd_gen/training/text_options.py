"""Flags of the recipe that trains a small Stable Diffusion."""

from dataclasses import dataclass

from vkd_gen.cli import Rare, check_at_least


@dataclass(frozen=True, kw_only=True)
class TextTeacherOptions:
    """The parts of a small Stable Diffusion, and how long each is trained."""

    resolution: int = 32
    """Height and width of the pictures in pixels; a multiple of 8."""
    vae_channels: Rare[tuple[int, int, int]] = (16, 32, 32)
    """Channels of the VAE's stages, of which there are three: it makes one latent of 4 x 4 pixels."""
    latent_channels: Rare[int] = 4
    """Channels of the latents."""
    vocab_size: Rare[int] = 1024
    """Most tokens of the tokenizer; 514 of them are bytes, alone or at a word's end, and the two special ones."""
    max_tokens: Rare[int] = 16
    """Tokens of a prompt, with start and end."""
    text_width: Rare[int] = 64
    """Width of the text encoder, which has two layers."""
    unet_channels: Rare[tuple[int, ...]] = (64, 96)
    """Channels of the UNet's stages, all with cross-attention in heads of 16."""
    vae_steps: int = 1800
    """Steps of the VAE, on the pictures of --vae_dataset."""
    decoder_steps: int = 1200
    """Steps of its decoder alone after that, on these and as many of the training pictures."""
    vae_learning_rate: Rare[float] = 3e-3
    """Its highest learning rate."""
    max_train_steps: int = 5600
    """Steps of the UNet and the text encoder."""
    learning_rate_steps: Rare[int] = 7200
    """Steps within which their learning rate would fall to 0 by a cosine."""
    learning_rate: float = 1.5e-3
    """Their highest learning rate."""
    train_batch_size: int = 32
    """Pictures per step."""
    guidance_dropout: float = 0.1
    """Share of the prompts that are dropped."""
    checkpointing_seconds: Rare[float] = 120
    """Time between checkpoints."""
    seed: int = 0
    """Of weights and draws."""

    def __post_init__(self) -> None:
        counts = (
            "vae_steps",
            "decoder_steps",
            "max_train_steps",
            "learning_rate_steps",
            "train_batch_size",
            "latent_channels",
        )
        rates = ("vae_learning_rate", "learning_rate", "checkpointing_seconds", "guidance_dropout", "seed")
        least = {**dict.fromkeys(counts, 1), **dict.fromkeys(rates, 0), "vocab_size": 514, "max_tokens": 3}
        check_at_least(self, least)
        if self.learning_rate_steps < self.max_train_steps:
            raise ValueError(f"--learning_rate_steps must be at least --max_train_steps, {self.max_train_steps}")
        multiples = {"resolution": 8, "text_width": 16, "vae_channels": 8, "unet_channels": 16}
        for name, factor in multiples.items():
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number < factor or number % factor:
                    raise ValueError(f"--{name} must be a multiple of {factor}, not {number}")
        if self.guidance_dropout >= 1:
            raise ValueError(f"--guidance_dropout must be below 1, not {self.guidance_dropout}")

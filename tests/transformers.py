"""Small transformers with random weights."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel


def tiny_dit(num_layers=4, heads=2, *, head_dim=8, size=4, learned_variance=True, num_classes=10, seed=0, **config):
    """A DiT of `heads * head_dim` channels for latents `[4, size, size]`."""
    torch.manual_seed(seed)
    return DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=8 if learned_variance else 4,
        num_layers=num_layers,
        sample_size=size,
        patch_size=config.pop("patch_size", 1),
        num_embeds_ada_norm=num_classes,
        **config,
    )


def dit_batch(batch_size=6, *, size=4, num_classes=10, seed=0):
    """Draws: latents, noise, timesteps and labels, the last of which is dropped."""
    generator = torch.Generator().manual_seed(seed)
    sample, noise = torch.randn(2, batch_size, 4, size, size, generator=generator)
    labels = torch.randint(0, num_classes, (batch_size,), generator=generator)
    labels[-1] = num_classes
    return {
        "sample": sample,
        "noise": noise,
        "timesteps": torch.randint(0, 1000, (batch_size,), generator=generator),
        "conditioning": {"class_labels": labels},
    }


def tiny_dit_pipeline(folder=None, *, scheduler=None, latent_channels=4, **config):
    """Images of classes, 8 x 8 pixels from 4 x 4 latents."""
    transformer = tiny_dit(**config)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=1,
        latent_channels=latent_channels,
        sample_size=8,
    )
    pipeline = DiTPipeline(transformer, vae, DDIMScheduler() if scheduler is None else scheduler)
    if folder is not None:
        pipeline.save_pretrained(folder)
    return pipeline

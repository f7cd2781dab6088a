"""Train the small classifier whose features score samples of digits and mnist.

python recipes/train_feature_network.py --dataset digits --output recipes/assets/digits-features.safetensors
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vkd_gen.training.command_line import announce, refuse_linked_file, run_recipe


@dataclass(frozen=True, kw_only=True)
class FeatureNetworkConfig:
    """Train a classifier of digits."""

    preset: str = "default"
    """There is one preset."""
    dataset: Literal["digits", "mnist"] = "digits"
    """The embedded set to train on; the part of it that training recipes hold out is held out here too."""
    output: str = "runs/digits-features.safetensors"
    """File to write."""
    num_epochs: int = 40
    """Passes through the images."""
    seed: int = 0
    """Seed of weights, order and augmentation."""


def main(config: FeatureNetworkConfig) -> None:
    """Train, measure on the held-out images and save."""
    if config.num_epochs < 1:
        raise ValueError(f"--num_epochs must be at least 1, not {config.num_epochs}")
    refuse_linked_file(config.output)
    announce(f"a feature network of {config.dataset}, to {config.output}")

    import torch

    from vkd_gen.data import embedded_pixels, load_images
    from vkd_gen.evaluation.feature_network import accuracy, save_feature_network, train_feature_network

    pixels, labels = embedded_pixels(config.dataset)
    parts = load_images(config.dataset, resolution=pixels.shape[-1], channels=1)
    train, held_out = parts
    train_labels, held_out_labels = (torch.as_tensor(labels[part.indices]).long() for part in parts)
    network = train_feature_network(train, train_labels, num_epochs=config.num_epochs, seed=config.seed)
    share = accuracy(network, held_out, held_out_labels)
    facts = {
        "dataset": config.dataset,
        "held_out_accuracy": f"{share:.4f}",
        "num_epochs": str(config.num_epochs),
        "seed": str(config.seed),
    }
    save_feature_network(network, Path(config.output), facts)
    print(f"{config.output}: {share:.2%} of {len(held_out)} held-out images right")


if __name__ == "__main__":
    run_recipe(main, {"default": FeatureNetworkConfig()}, __doc__, default="default")

"""Train a small classifier on images of given classes; its features score samples for which Inception's mean little.

python recipes/train_feature_network.py --dataset digits --output recipes/assets/digits-features.safetensors
python recipes/train_feature_network.py --dataset IMAGES --output runs/my-features.safetensors
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vkd_gen.choices import OnBadImage
from vkd_gen.cli import announce, check_output_file, run_recipe
from vkd_gen.evaluation.labels import data_label

SIZES = {"digits": (8, 1), "mnist": (28, 1)}
"""Resolution and channels of the embedded sets."""


@dataclass(frozen=True, kw_only=True)
class FeatureNetworkConfig:
    """Train a classifier of images; its features then score samples, by the recipes' --extractor."""

    preset: str = "default"
    """There is one preset."""
    dataset: str = "digits"
    """`digits`, `mnist`, a folder with one folder of images per class, parquet or arrow files, or a hub id. The images
    that training recipes hold out are held out here too."""
    image_column: str | None = None
    """Column of a table with the images; by default the only one that has images."""
    label_column: str | None = None
    """Column of a table with the classes; by default the only one that has classes, else `label`."""
    on_bad_image: OnBadImage = "refuse"
    """What to do about an image that cannot be read: `refuse` stops, `skip` leaves it out."""
    resolution: int | None = None
    """Height and width in pixels of the samples to score; by default 8 for digits, 28 for mnist, else 32."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for RGB; by default grey for digits and mnist, else RGB."""
    output: str = ""
    """File to write, ending in .safetensors; by default runs/NAME-features.safetensors."""
    num_epochs: int = 40
    """Passes through the images."""
    seed: int = 0
    """Seed of the weights, the order of images and the augmentation."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if self.num_epochs < 1:
            raise ValueError(f"--num_epochs must be at least 1, not {self.num_epochs}")
        if self.output and not self.output.endswith(".safetensors"):
            raise ValueError(f"--output {self.output} must end in .safetensors, by which --extractor knows such a file")


def main(config: FeatureNetworkConfig) -> None:
    """Train, measure on the held-out images and save."""
    name = data_label(config.dataset)
    output = config.output or f"runs/{name}-features.safetensors"
    check_output_file(output)
    announce(f"a feature network of {config.dataset}, to {output}")

    from vkd_gen.data.embedded import EMBEDDED
    from vkd_gen.data.images import told_of
    from vkd_gen.data.sources import load_images
    from vkd_gen.evaluation.feature_network import (
        accuracy,
        check_network_name,
        save_feature_network,
        train_feature_network,
    )

    check_network_name(name, output)
    resolution, channels = SIZES.get(config.dataset, (32, 3))
    train, held_out = load_images(
        config.dataset,
        resolution=config.resolution or resolution,
        channels=config.channels or channels,
        image_column=config.image_column,
        with_labels=True,
        label_column=config.label_column,
        on_bad_image=config.on_bad_image,
    )
    print(
        f"{config.dataset}: {len(train):,} images of {train.num_classes} classes, {len(held_out):,} held out",
        flush=True,
    )
    for line in told_of(train, held_out):
        print(line)
    network = train_feature_network(train, num_epochs=config.num_epochs, seed=config.seed)
    share = accuracy(network, held_out)
    facts = {
        "dataset": name,
        "held_out_accuracy": f"{share:.4f}",
        "num_epochs": str(config.num_epochs),
        "seed": str(config.seed),
    }
    if config.dataset not in EMBEDDED:
        facts |= {"resolution": str(train.resolution), "classes": str(train.num_classes)}
    save_feature_network(network, Path(output), facts)
    print(f"{output}: {share:.2%} of {len(held_out)} held-out images correct")


PRESETS = {"default": FeatureNetworkConfig()}

if __name__ == "__main__":
    run_recipe(main, PRESETS, __doc__, default="default")

"""What is chosen by name. Flags are read by these types, so nothing is imported here."""

from typing import Literal

FeatureLoss = Literal["mse", "smooth_l1", "cka"]
"""How features are compared."""
Normalization = Literal["none", "layer_norm", "center", "standardize", "whiten", "batch_whiten"]
"""What the teacher's features go through."""
PairedLayers = Literal["all", "mid_and_up", "last_up", "self_attention", "bk"]
"""Which layers are paired."""
GuidanceBranches = Literal["drawn", "both"]
"""What a draw is told: its prompt or class, now and then dropped, or both that and nothing."""
ChannelChoice = Literal["activation", "magnitude", "first", "random"]
"""Which of the teacher's channels a narrower student starts from."""
Rescaling = Literal["none", "fan_in", "least_squares"]
"""What makes up for missing channels at the start."""
Sampler = Literal["ddim", "ddpm", "dpm-solver", "pndm", "euler"]
"""How images are sampled; by the last two text pipelines alone."""
TimestepSampling = Literal["random", "stratified", "logit_normal", "mode"]
"""How times are drawn."""
Precision = Literal["no", "fp16", "bf16"]
"""Precision of a network's forward pass."""
OnBadImage = Literal["refuse", "skip"]
"""What becomes of an image that cannot be read: see `vkd_gen.data.sources.load_images`."""
OnMissingCaption = Literal["refuse", "skip", "empty"]
"""What becomes of an image without a caption: see `vkd_gen.data.images.ImageSpec`."""

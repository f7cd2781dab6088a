"""What a student has less of than its teacher, and published students by name. Nothing is imported here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """What a student has less of than its teacher: of a UNet all but `blocks`, of a transformer `width` and `blocks`.

    Attributes:
        width: factor on every stage's channels, above 0; rounded up to what group norms and attention heads need. Of a
            transformer a factor on its heads, rounded up.
        layers_per_block: residual layers of each block; one number, or (`UNet2DConditionModel` alone) one for each of
            the stages that are kept. None keeps the teacher's.
        transformer_layers: transformer blocks of each attention layer, `UNet2DConditionModel` alone; one number, or one
            for each of the stages that are kept, the last of which is also the middle's. None keeps the teacher's.
        drop_stages: stages to leave out, 0 being the one of the highest resolution and -1 the lowest.
        drop_mid_block: leave out the middle block.
        drop_attention: stages of the teacher to take the attention layers out of.
        blocks: how many of a transformer's blocks are kept, or which, by number. None keeps all.
    """

    width: float = 1.0
    layers_per_block: int | tuple[int, ...] | None = None
    drop_stages: tuple[int, ...] = ()
    drop_mid_block: bool = False
    drop_attention: tuple[int, ...] = ()
    transformer_layers: int | tuple[int, ...] | None = None
    blocks: int | tuple[int, ...] | None = None


REDUCTIONS = {
    # Kim et al., 2023, arXiv 2305.15798: one layer fewer in each block; no middle; no lowest stage.
    "bk-base": Reduction(layers_per_block=1),
    "bk-small": Reduction(layers_per_block=1, drop_mid_block=True),
    "bk-tiny": Reduction(layers_per_block=1, drop_mid_block=True, drop_stages=(-1,)),
    # Lee et al., 2023, arXiv 2312.04005, for Stable Diffusion XL: fewer transformer blocks in the lowest stage too. The
    # highest stage has no attention, so that its 1, which the configuration wants, stands for the authors' 0.
    "koala-1b": Reduction(layers_per_block=1, transformer_layers=(1, 2, 6)),
    "koala-700m": Reduction(layers_per_block=1, transformer_layers=(1, 2, 5), drop_mid_block=True),
    # The size of Gupta et al., 2024, arXiv 2401.02677, for Stable Diffusion XL: no layer fewer, but transformer blocks.
    # How many they left out differs from layer to layer of a stage, and they have no attention in the middle.
    "ssd-1b-like": Reduction(transformer_layers=(1, 2, 4)),
    # The size of Fang et al., 2023, arXiv 2305.10924, on CIFAR-10. Theirs is a pruned module that no configuration
    # describes. Of widths in groups of 32 the nearest to its 19.8 M parameters has 20.1 M (1.6 % more), and like it
    # 3.4 G multiply-accumulates without attention's products, 3.5 G with them (the teacher 6.1 and 6.2).
    "ddpm-20m": Reduction(width=0.75),
}
"""Students by name. They are rules: `bk-tiny` of a teacher of three stages has two. With the teachers of
`vkd_gen.families.PUBLISHED` they have the published sizes."""

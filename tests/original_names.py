"""A pipeline's weights by the names that Stable Diffusion's authors gave them: one file for all, as published."""

import torch

RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
)
UNET = (
    ("time_embedding.linear_1.", "time_embed.0."),
    ("time_embedding.linear_2.", "time_embed.2."),
    ("add_embedding.linear_1.", "label_emb.0.0."),
    ("add_embedding.linear_2.", "label_emb.0.2."),
    ("conv_in.", "input_blocks.0.0."),
    ("conv_norm_out.", "out.0."),
    ("conv_out.", "out.2."),
    ("mid_block.attentions.0.", "middle_block.1."),
    ("mid_block.resnets.0.", "middle_block.0."),
    ("mid_block.resnets.1.", "middle_block.2."),
)
OPEN_CLIP = (
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    (".fc1.", ".c_fc."),
    (".fc2.", ".c_proj."),
    ("self_attn", "attn"),
    ("final_layer_norm.", "ln_final."),
    ("embeddings.token_embedding.weight", "token_embedding.weight"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
)


def original_checkpoint(pipeline, *, open_clip=False):
    """All weights of a pipeline by their original names; `open_clip` for the text encoder of Stable Diffusion 2."""
    tensors = {f"model.diffusion_model.{name}": value for name, value in _unet(pipeline.unet).items()}
    tensors |= {f"first_stage_model.{name}": value for name, value in _vae(pipeline.vae).items()}
    is_xl = getattr(pipeline, "text_encoder_2", None) is not None
    first = {name.removeprefix("text_model."): value for name, value in pipeline.text_encoder.state_dict().items()}
    if open_clip:
        tensors |= {f"cond_stage_model.model.{name}": value for name, value in _open_clip(first).items()}
    else:
        place = "conditioner.embedders.0.transformer" if is_xl else "cond_stage_model.transformer"
        tensors |= {f"{place}.text_model.{name}": value for name, value in first.items()}
    if is_xl:
        second = _open_clip(pipeline.text_encoder_2.state_dict())
        tensors |= {f"conditioner.embedders.1.model.{name}": value for name, value in second.items()}
    return {name: value.clone().contiguous() for name, value in tensors.items()}


def _unet(unet):
    stages = len(unet.down_blocks)
    blocks = []
    for stage in range(stages):
        has_attention = bool(getattr(unet.up_blocks[stage], "attentions", None))
        for layer in range(3):
            if layer < 2:
                number = 3 * stage + layer + 1
                blocks.append((f"down_blocks.{stage}.resnets.{layer}.", f"input_blocks.{number}.0."))
                blocks.append((f"down_blocks.{stage}.attentions.{layer}.", f"input_blocks.{number}.1."))
            blocks.append((f"up_blocks.{stage}.resnets.{layer}.", f"output_blocks.{3 * stage + layer}.0."))
            blocks.append((f"up_blocks.{stage}.attentions.{layer}.", f"output_blocks.{3 * stage + layer}.1."))
        blocks.append((f"down_blocks.{stage}.downsamplers.0.conv.", f"input_blocks.{3 * stage + 3}.0.op."))
        blocks.append((f"up_blocks.{stage}.upsamplers.0.", f"output_blocks.{3 * stage + 2}.{1 + has_attention}."))
    renamed = {}
    for name, value in unet.state_dict().items():
        new = name
        if "resnets" in name:
            new = _replaced(new, RESNET)
        renamed[_replaced(new, UNET if name.startswith("conv") else (*UNET[:4], *UNET[7:], *blocks))] = value
    return renamed


def _vae(vae):
    stages = len(vae.config.block_out_channels)
    pairs = [("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out")]
    attention = (
        ("group_norm.", "norm."),
        ("to_q.", "q."),
        ("to_k.", "k."),
        ("to_v.", "v."),
        ("to_out.0.", "proj_out."),
    )
    for stage in range(stages):
        pairs.append((f"down_blocks.{stage}.downsamplers.0.", f"down.{stage}.downsample."))
        pairs.append((f"up_blocks.{stage}.upsamplers.0.", f"up.{stages - 1 - stage}.upsample."))
        for layer in range(3):
            pairs.append((f"down_blocks.{stage}.resnets.{layer}.", f"down.{stage}.block.{layer}."))
            pairs.append((f"up_blocks.{stage}.resnets.{layer}.", f"up.{stages - 1 - stage}.block.{layer}."))
    pairs += [(f"mid_block.resnets.{layer}.", f"mid.block_{layer + 1}.") for layer in range(2)]
    renamed = {}
    for name, value in vae.state_dict().items():
        if "attentions" in name:
            new = _replaced(name.replace("mid_block.attentions.0.", "mid.attn_1."), attention)
            renamed[new] = value[..., None, None] if value.ndim == 2 else value
        else:
            renamed[_replaced(name, pairs)] = value
    return renamed


def _open_clip(state):
    state = {name.removeprefix("text_model."): value for name, value in state.items()}
    renamed = {}
    for name, value in state.items():
        if name == "text_projection.weight":
            renamed["text_projection"] = value.T
        elif ".q_proj." in name:
            layer, kind = name.split(".q_proj.")
            joined = torch.cat([state[f"{layer}.{part}_proj.{kind}"] for part in "qkv"])
            renamed[_replaced(f"{layer}.in_proj_{kind}", OPEN_CLIP)] = joined
        elif ".k_proj." not in name and ".v_proj." not in name:
            renamed[_replaced(name, OPEN_CLIP)] = value
    return renamed


def _replaced(name, pairs):
    for old, new in pairs:
        name = name.replace(old, new)
    return name

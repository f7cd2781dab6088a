import gc
import json
import weakref

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from tests.conftest import tiny_condition_unet, tiny_unet
from vkd_gen.families import feature_shapes
from vkd_gen.features import (
    FeatureCapture,
    check_layers,
    nearest_names,
    pool,
    to_rows,
)

UNET_LAYERS = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0.resnets.1", "up_blocks.0", "up_blocks.1")
CONDITION_LAYERS = (
    "down_blocks.0",
    "down_blocks.0.attentions.0",
    "down_blocks.0.attentions.0.transformer_blocks.0",
    "mid_block",
    "up_blocks.1.resnets.0",
    "up_blocks.1",
)


def unet_inputs(batch_size=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, 1, 8, 8, generator=generator), torch.arange(batch_size) * 100


def capture_forward(unet, capture, *inputs, **options):
    capture.start()
    prediction = unet(*inputs, **options).sample
    return prediction, capture.stop()


def features_loss(prediction, features):
    """Depends on the prediction and, unevenly, on each feature."""
    return prediction.square().mean() + sum(
        weight * feature.square().mean() for weight, feature in enumerate(features.values(), start=2)
    )


def gradients(unet):
    return {name: None if p.grad is None else p.grad.clone() for name, p in unet.named_parameters()}


# FeatureCapture


def run_by_hand(unet, sample, timesteps):
    """The forward pass of UNet2DModel written out, with every intermediate result by its layer's name."""
    outputs = {}
    embedding = unet.time_embedding(unet.time_proj(timesteps))
    hidden = unet.conv_in(sample)
    skips = [hidden]
    for i, block in enumerate(unet.down_blocks):
        hidden, block_skips = block(hidden, embedding)
        outputs[f"down_blocks.{i}"] = hidden
        skips += block_skips
    hidden = outputs["mid_block"] = unet.mid_block(hidden, embedding)
    for i, block in enumerate(unet.up_blocks):
        for j, resnet in enumerate(block.resnets):
            hidden = outputs[f"up_blocks.{i}.resnets.{j}"] = resnet(torch.cat([hidden, skips.pop()], 1), embedding)
        if block.upsamplers is not None:
            hidden = block.upsamplers[0](hidden)
        outputs[f"up_blocks.{i}"] = hidden
    return outputs


def test_features_are_the_layers_outputs():
    unet = tiny_unet()
    capture = FeatureCapture(unet, UNET_LAYERS)
    inputs = unet_inputs()
    prediction, features = capture_forward(unet, capture, *inputs)
    expected = run_by_hand(unet, *inputs)
    assert list(features) == list(UNET_LAYERS)
    for layer in UNET_LAYERS:
        torch.testing.assert_close(features[layer], expected[layer], msg=layer)
    head = unet.conv_out(unet.conv_act(unet.conv_norm_out(features["up_blocks.1"])))
    torch.testing.assert_close(prediction, head)


def test_condition_unet_outputs_are_resolved_to_tensors():
    """Down blocks return (hidden states, skip states), attention layers (hidden states,)."""
    unet = tiny_condition_unet()
    capture = FeatureCapture(unet, CONDITION_LAYERS)
    sample, tokens = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    prediction, features = capture_forward(unet, capture, sample, torch.tensor([3, 700]), tokens)
    assert {layer: tuple(feature.shape) for layer, feature in features.items()} == {
        "down_blocks.0": (2, 8, 4, 4),
        "down_blocks.0.attentions.0": (2, 8, 8, 8),
        "down_blocks.0.attentions.0.transformer_blocks.0": (2, 64, 8),
        "mid_block": (2, 16, 4, 4),
        "up_blocks.1.resnets.0": (2, 8, 8, 8),
        "up_blocks.1": (2, 8, 8, 8),
    }
    # What follows each layer in the model, applied by hand, gives the next one.
    attended, down = features["down_blocks.0.attentions.0"], features["down_blocks.0"]
    torch.testing.assert_close(unet.down_blocks[0].downsamplers[0](attended), down)
    head = unet.conv_out(unet.conv_act(unet.conv_norm_out(features["up_blocks.1"])))
    torch.testing.assert_close(prediction, head)


def test_features_come_in_the_order_asked_for():
    unet = tiny_unet()
    capture = FeatureCapture(unet, reversed(UNET_LAYERS))
    assert list(capture_forward(unet, capture, *unet_inputs())[1]) == list(reversed(UNET_LAYERS))


def test_only_passes_between_start_and_stop_are_recorded():
    unet = tiny_unet()
    capture = FeatureCapture(unet, ["mid_block"])
    unet(*unet_inputs(seed=1))  # before
    first, features = capture_forward(unet, capture, *unet_inputs(seed=2))
    value = features["mid_block"].clone()
    unet(*unet_inputs(seed=3))  # after
    with pytest.raises(RuntimeError, match="did not run"):
        capture.stop()
    torch.testing.assert_close(features["mid_block"], value, rtol=0, atol=0)
    assert first.shape == (2, 1, 8, 8)


def test_layer_that_did_not_run_is_named():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    capture = FeatureCapture(model, ["used", "unused"])
    capture.start()
    model["used"](torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match=r"did not run in the forward pass: unused$"):
        capture.stop()


def test_remove_takes_every_hook_off():
    unet = tiny_unet()
    capture = FeatureCapture(unet, UNET_LAYERS)
    assert sum(len(module._forward_hooks) for module in unet.modules()) == len(UNET_LAYERS)
    capture.remove()
    assert sum(len(module._forward_hooks) for module in unet.modules()) == 0
    capture.start()
    unet(*unet_inputs())
    with pytest.raises(RuntimeError, match="did not run"):
        capture.stop()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_kept_alive_after_stop(checkpointing):
    unet = tiny_unet().train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    capture = FeatureCapture(unet, UNET_LAYERS)
    prediction, features = capture_forward(unet, capture, *unet_inputs())
    features_loss(prediction, features).backward()
    alive = [weakref.ref(feature) for feature in features.values()] + [weakref.ref(prediction)]
    assert all(reference() is not None for reference in alive)
    del prediction, features
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)


# Gradient checkpointing and accumulation


# torch.compile

COMPILED_LAYERS = ("down_blocks.0", "mid_block", "up_blocks.0.resnets.1")


# Layer names


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("up_block.0.resnets.1", "up_blocks.0.resnets.1"),
        ("midblock", "mid_block"),
        ("down_blocks.2", "down_blocks.1"),
        ("module.down_blocks.1", "down_blocks.1"),  # as inside DDP
    ],
)
def test_unknown_layer_names_the_nearest(wrong, nearest):
    with pytest.raises(ValueError, match="UNet2DModel has no layer") as error:
        FeatureCapture(tiny_unet(), ["mid_block", wrong])
    assert repr(wrong) in str(error.value)
    assert repr(nearest) in str(error.value)


def test_the_model_itself_is_no_layer():
    with pytest.raises(ValueError, match="has no layer ''"):
        check_layers(tiny_unet(), [""])


def test_layer_named_twice():
    with pytest.raises(ValueError, match="named twice"):
        FeatureCapture(tiny_unet(), ["mid_block", "up_blocks.0", "mid_block"])


def test_nearest_names():
    assert nearest_names("mid_blok", ["", "conv_in", "mid_block"]) == "'mid_block'"
    # nothing is alike: the first ones
    assert nearest_names("zzz", ["", "conv_in", "mid_block"], count=1) == "'conv_in'"
    assert nearest_names("block.0", ["blocks.1", "blocks.0", "xyz"], count=1) == "'blocks.0'"


# pooling


def test_pool_known_value():
    feature = torch.arange(16.0).view(1, 1, 4, 4)
    assert pool(feature, 2).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    assert pool(feature, 4).item() == 7.5
    assert pool(feature, 1) is feature


@pytest.mark.parametrize("side", [2, 3])
def test_tokens_pool_as_the_map_they_are_from(side):
    feature = torch.randn(2, 5, 6, 6)
    torch.testing.assert_close(pool(to_rows(feature), side), to_rows(pool(feature, side)))


@pytest.mark.parametrize("shape", [(1, 2, 4, 6), (1, 16, 2), (1, 12, 2), (1, 9)])
def test_pool_refuses_what_does_not_divide(shape):
    """4 x 6, tokens of 4 x 4, tokens of no square, a vector: none of them falls into squares of 3 x 3."""
    with pytest.raises(
        ValueError, match=rf"shape {list(shape)} cannot be averaged over squares of 3 x 3".replace("[", r"\[")
    ):
        pool(torch.zeros(shape), 3)


POOLED = ["mid_block", "mid_block/2", "mid_block.attentions.0.to_q/4"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_capture_hands_over_pooled_features_with_their_gradients(checkpointing):
    unet = tiny_unet((8, 16), attention=True).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    _, features = capture_forward(unet, FeatureCapture(unet, POOLED), torch.randn(2, 1, 8, 8), 3)
    assert [tuple(feature.shape) for feature in features.values()] == [(2, 16, 4, 4), (2, 16, 2, 2), (2, 1, 16)]
    torch.testing.assert_close(features["mid_block/2"], pool(features["mid_block"], 2))
    features["mid_block.attentions.0.to_q/4"].square().sum().backward()
    reached = [name for name, parameter in unet.named_parameters() if parameter.grad is not None]
    assert "mid_block.attentions.0.to_q.weight" in reached
    assert "mid_block.attentions.0.to_k.weight" not in reached


def test_feature_shapes_of_pooled_layers():
    shapes = feature_shapes(tiny_unet((8, 16), attention=True), POOLED)
    assert list(shapes.values()) == [(16, 4, 4), (16, 2, 2), (1, 16)]


# to_rows


def test_to_rows_known_value():
    """Two channels on a 1 x 3 map: row n holds both channels at position n."""
    feature = torch.tensor([[[[1.0, 2.0, 3.0]], [[10.0, 20.0, 30.0]]]])
    assert to_rows(feature).tolist() == [[[1, 10], [2, 20], [3, 30]]]


def test_to_rows_keeps_tokens_and_vectors():
    tokens, vectors = torch.randn(2, 7, 3), torch.randn(2, 3)
    assert torch.equal(to_rows(tokens), tokens)
    assert to_rows(vectors).shape == (2, 1, 3)
    assert torch.equal(to_rows(vectors)[:, 0], vectors)


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3, 4, 5)])
def test_to_rows_refuses_other_ranks(shape):
    with pytest.raises(ValueError, match="a feature has shape"):
        to_rows(torch.zeros(shape))


# feature_shapes


def from_changed_config(unet, **changes):
    return type(unet).from_config({**unet.config, **changes})


def make_class_unet():
    return tiny_unet(num_class_embeds=10), {"class_labels": torch.tensor([1, 2])}


def make_wide_unet():
    return tiny_unet(size=(8, 16), attention=True), {}


def make_three_stage_unet():
    return tiny_unet((4, 8, 12), in_channels=3, layers_per_block=2), {}


def make_condition_unet():
    return tiny_condition_unet(), {"encoder_hidden_states": torch.randn(2, 5, 8)}


def make_odd_condition_unet():
    """Unlike UNet2DModel, UNet2DConditionModel takes sizes that its stages do not divide."""
    unet = from_changed_config(tiny_condition_unet(), sample_size=7)
    return unet, {"encoder_hidden_states": torch.randn(2, 5, 8)}


def make_sdxl_like_unet():
    unet = from_changed_config(
        tiny_condition_unet(),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
    )
    added = {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)}
    return unet, {"encoder_hidden_states": torch.randn(2, 5, 8), "added_cond_kwargs": added}


@pytest.mark.parametrize(
    "make",
    [
        make_class_unet,
        make_wide_unet,
        make_three_stage_unet,
        make_condition_unet,
        make_odd_condition_unet,
        make_sdxl_like_unet,
    ],
)
def test_feature_shapes_equal_a_real_forward_pass(make):
    unet, conditioning = make()
    layers = [name for name, _ in unet.named_children() if name.startswith("conv")]
    layers += ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0.resnets.1", "up_blocks.0", "up_blocks.1"]
    if isinstance(unet, UNet2DConditionModel):
        layers += ["down_blocks.0.attentions.0.transformer_blocks.0"]
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    sample = torch.randn(2, unet.config.in_channels, height, width)
    with torch.no_grad():
        _, features = capture_forward(unet, FeatureCapture(unet, layers), sample, torch.tensor([0, 5]), **conditioning)
    expected = {layer: tuple(feature.shape[1:]) for layer, feature in features.items()}
    assert feature_shapes(unet, layers) == expected
    assert list(feature_shapes(unet, layers)) == layers


def test_feature_shapes_leaves_model_and_randomness_alone():
    unet = tiny_unet()
    unet.train()
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in unet.state_dict().items()}
    feature_shapes(unet, UNET_LAYERS)
    assert torch.equal(torch.get_rng_state(), state)
    assert unet.training
    assert sum(len(module._forward_hooks) for module in unet.modules()) == 0
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert torch.zeros(1).device.type == "cpu"  # the default device is restored


def test_feature_shapes_refuses_a_size_that_does_not_fit():
    """7 -> 4 -> 8: the skip connection of size 7 cannot be joined."""
    unet = tiny_unet(size=7)
    with pytest.raises(ValueError, match="UNet2DModel cannot take a sample of size 7"):
        feature_shapes(unet, ["mid_block"])
    assert torch.zeros(1).device.type == "cpu"


def test_feature_shapes_refuses_a_model_without_a_size():
    """diffusers allows `sample_size=None`, its default; there is then no shape to name."""
    unet = UNet2DModel.from_config({**tiny_unet().config, "sample_size": None})
    with pytest.raises(ValueError, match="sample_size"):
        feature_shapes(unet, ["mid_block"])


def test_feature_shapes_follow_what_is_registered_after_loading(tmp_path):
    """diffusers notes which entries a config.json leaves out, and would set them back to their defaults."""
    tiny_unet().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sample_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    unet = UNet2DModel.from_pretrained(tmp_path)
    unet.register_to_config(sample_size=16)
    assert feature_shapes(unet, ["mid_block"]) == {"mid_block": (16, 8, 8)}

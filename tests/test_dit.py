"""DiT as a family: called, paired, made smaller, inherited from and distilled."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
)

import vkd_gen as vkd
from tests.conftest import tiny_unet
from tests.transformers import dit_batch, tiny_dit, tiny_dit_pipeline
from vkd_gen.data.draws import Draws
from vkd_gen.evaluation.cost import count_macs, count_parameters, forward_costs
from vkd_gen.evaluation.errors import held_out_errors
from vkd_gen.families import TEACHERS, copy_without_weights, family_of, feature_shapes
from vkd_gen.families.activations import step0_error
from vkd_gen.families.blocks import evenly_spaced_blocks
from vkd_gen.families.channels import choose_channels
from vkd_gen.families.dit_links import link_blocks, nearest_positions
from vkd_gen.families.inherit import _slice
from vkd_gen.models import Model
from vkd_gen.pairing import LayerPair, pair_table
from vkd_gen.reductions import Reduction

EVERY_LAYER = {"all": "transformer_blocks.{}", "self_attention": "transformer_blocks.{}.attn1"}


def distil(student, teacher, batch, schedule, layers="all", **options):
    """The losses of one step, and the module that trains."""
    pairs = vkd.pair_layers(student, teacher, layers=layers)
    projectors = [vkd.OrthogonalProjector(pair.student_channels, pair.teacher_channels) for pair in pairs]
    normalizers = [vkd.FeatureNormalizer("none", channels=pair.teacher_channels, num_timestep_bins=1) for pair in pairs]
    frozen = vkd.FrozenTeacher(teacher, [pair.teacher for pair in pairs])
    projected = vkd.ProjectedStudent(student, pairs, projectors, normalizers, schedule=schedule)
    projected.calibrate(frozen, [batch], schedule)
    return vkd.distillation_losses(projected, batch, schedule=schedule, teacher=frozen, **options), projected


def public(config):
    return {entry: value for entry, value in config.items() if not entry.startswith("_")}


# ---- called


@pytest.mark.parametrize("learned_variance", [True, False])
def test_the_prediction_is_the_first_half_of_the_output(learned_variance):
    network, batch = tiny_dit(learned_variance=learned_variance), dit_batch()
    with torch.no_grad():
        found = family_of(network).call(network.eval(), batch["noise"], batch["timesteps"], batch["conditioning"])
        expected = network(batch["noise"], batch["timesteps"], batch["conditioning"]["class_labels"]).sample
    assert found.shape == batch["noise"].shape
    assert torch.equal(found, expected[:, :4])


def test_a_student_in_training_drops_no_labels_by_itself():
    """Diffusers' own drops a tenth in training, of other images in each block, by the global generator."""
    batch, network = dit_batch(64), tiny_dit().train()
    noisy, timesteps, labels = batch["noise"], batch["timesteps"], batch["conditioning"]["class_labels"]
    assert not torch.equal(network(noisy, timesteps, labels).sample, network(noisy, timesteps, labels).sample)
    config = dict(network.config)
    student = vkd.ProjectedStudent(network).train()
    state = torch.get_rng_state()
    trained, _ = student(noisy, timesteps, batch["conditioning"])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(trained, student.eval()(noisy, timesteps, batch["conditioning"])[0])
    assert dict(network.config) == config


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_whole_teacher_as_a_student_predicts_what_the_teacher_does(guidance_scale):
    """Nothing reduced: through our call path, bit for bit, and through the stock pipeline."""
    teacher = tiny_dit(3, num_classes=1000)
    student = vkd.build_student(teacher, Reduction())
    vkd.inherit_weights(student, teacher)
    assert public(student.config) == public(teacher.config)
    batch = dit_batch(num_classes=1000)
    frozen, projected = vkd.FrozenTeacher(copy.deepcopy(teacher)), vkd.ProjectedStudent(student)
    arguments = batch["noise"], batch["timesteps"], batch["conditioning"]
    assert torch.equal(projected(*arguments)[0], frozen(*arguments)[0])
    model = Model(tiny_dit_pipeline(num_layers=3, num_classes=1000))
    model.network.eval().load_state_dict(teacher.state_dict())
    with torch.no_grad():
        assert torch.equal(model.predict(*arguments), frozen(*arguments)[0])
    images = [
        each.images([0, 1], num_inference_steps=2, guidance_scale=guidance_scale)
        for each in (model, model.around(student))
    ]
    assert torch.equal(*images)


def test_costs_and_shapes_need_no_weights():
    network = tiny_dit(3, size=4, patch_size=2)
    assert feature_shapes(network, ["transformer_blocks.2"]) == {"transformer_blocks.2": (4, 16)}
    assert count_parameters(copy_without_weights(network)) == count_parameters(network)
    assert count_macs(network) > 3 * 4 * 12 * 16**2  # tokens times the matrices of blocks
    assert forward_costs({"it": network}, repeats=1)["it"]["peak_memory_bytes"] > 4 * count_parameters(network)


def test_parameters_of_the_published_size():
    """749.8 M in diffusers' class: 675 M, and 27 further embedders of time and label (256 and 1,001 rows to 1,152)."""
    with torch.device("meta"):
        network = DiTTransformer2DModel.from_config(TEACHERS["dit-xl-2"])
    embedder = (256 + 1) * 1152 + (1152 + 1) * 1152 + 1001 * 1152
    assert round(count_parameters(network), -5) == 749_800_000
    assert round(count_parameters(network) - 27 * embedder, -6) == 675_000_000
    assert vkd.published_cost(network.config).parameters == 749_800_000
    assert vkd.published_cost({**TEACHERS["dit-xl-2"], "sample_size": 64}).parameters == 749_800_000
    assert vkd.published_cost({**TEACHERS["dit-xl-2"], "num_layers": 27}) is None


# ---- paired


@pytest.mark.parametrize("layers", EVERY_LAYER)
def test_blocks_are_paired_by_their_share_of_the_depth(layers):
    """By hand: the first of 3 blocks ends a third; of 6, that is the second."""
    pairs = vkd.pair_layers(tiny_dit(3, 1), tiny_dit(6, 2), layers=layers)
    name = EVERY_LAYER[layers]
    assert [(pair.student, pair.teacher) for pair in pairs] == [
        (name.format(student), name.format(teacher)) for student, teacher in ((0, 1), (1, 3), (2, 5))
    ]
    assert [pair.depths for pair in pairs] == [(1 / 3, 2 / 6), (2 / 3, 4 / 6), (1.0, 1.0)]
    assert pairs[0].student_shape == (16, 8)
    assert pairs[0].teacher_shape == (16, 16)


def test_depths_are_printed():
    text = pair_table(vkd.pair_layers(tiny_dit(2), tiny_dit(4))).splitlines()
    assert text[0].split() == ["student", "layer", "shape", "depth", "teacher", "layer", "shape", "depth", "projector"]
    assert text[1].split()[:3] == ["transformer_blocks.0", "16x16", "50%"]
    assert text[1].split()[3:] == ["transformer_blocks.1", "16x16", "50%", "16", "->", "16"]
    assert "depth" not in pair_table([LayerPair("mid_block", "mid_block", (1, 2, 2), (1, 2, 2))])


def test_pairs_can_be_named_and_unlike_numbers_of_tokens_are_averaged():
    pairs = vkd.pair_layers(
        tiny_dit(2, patch_size=2), tiny_dit(4), pairs=[("transformer_blocks.1", "transformer_blocks.2")]
    )
    names = "transformer_blocks.1", "transformer_blocks.2/2"
    assert pairs == [LayerPair(*names, (4, 16), (4, 16), depths=(1.0, 0.75))]


@pytest.mark.parametrize("layers", ["mid_and_up", "last_up", "bk"])
def test_choices_of_unets_are_refused(layers):
    with pytest.raises(ValueError, match="are a UNet's; of a transformer choose all or self_attention"):
        vkd.pair_layers(tiny_dit(2), tiny_dit(4), layers=layers)


def test_a_unet_and_a_transformer_have_no_counterparts():
    with pytest.raises(ValueError, match="have no counterparts; name the pairs"):
        vkd.pair_layers(tiny_unet(in_channels=4, size=4), tiny_dit(2))


# ---- made smaller


REDUCED = {
    "nothing": (Reduction(), {}),
    "half of the blocks": (Reduction(blocks=2), {"num_layers": 2}),
    "named blocks": (Reduction(blocks=(0, 1, 3)), {"num_layers": 3}),
    "half of the heads": (Reduction(width=0.5), {"num_attention_heads": 1}),
    "rounded up": (Reduction(width=0.6), {"num_attention_heads": 2}),
    "both": (Reduction(width=0.5, blocks=1), {"num_attention_heads": 1, "num_layers": 1}),
}


@pytest.mark.parametrize("name", REDUCED)
def test_reduced_configurations_are_stock_ones(name, tmp_path):
    reduction, changed = REDUCED[name]
    teacher = tiny_dit()
    student = vkd.build_student(teacher, reduction)
    assert public(student.config) == public(teacher.config) | changed
    student.save_pretrained(tmp_path)
    again = DiTTransformer2DModel.from_pretrained(tmp_path)
    batch = dit_batch()
    arguments = batch["noise"], batch["timesteps"], batch["conditioning"]["class_labels"]
    assert torch.equal(again.eval()(*arguments).sample, student.eval()(*arguments).sample)


@pytest.mark.parametrize(
    ("reduction", "words"),
    [
        (Reduction(blocks=0), "has 1 to 4 of them, not 0"),
        (Reduction(blocks=5), "has 1 to 4 of them, not 5"),
        (Reduction(blocks=(0, 4)), "there is no block 4; the teacher's are 0 to 3"),
        (Reduction(blocks=(0, -1)), "there is no block -1"),
        (Reduction(blocks=(1, 2)), "block 0 must be kept"),
        (Reduction(blocks=(0, 2, 1)), "named once each, in their order, not 0 2 1"),
        (Reduction(blocks=(0, 0)), "named once each"),
        (Reduction(blocks=()), "named once each"),
        (Reduction(width=0), "width must be above 0 and finite"),
        (Reduction(width=float("nan")), "width must be above 0 and finite"),
        (Reduction(layers_per_block=1), "layers_per_block is of UNets"),
        (Reduction(drop_mid_block=True), "drop_mid_block is of UNets"),
    ],
)
def test_what_no_student_can_be_is_refused(reduction, words):
    with pytest.raises(ValueError, match=words):
        vkd.build_student(tiny_dit(), reduction)


def test_blocks_are_no_unets():
    with pytest.raises(ValueError, match="blocks is of transformers"):
        vkd.build_student(tiny_unet(), Reduction(blocks=1))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"attention_head_dim": 5}, "2 heads of 5 channels are 10, and positions are embedded in multiples of 4"),
        ({"sample_size": 5, "patch_size": 2}, "no whole number of patches of 2"),
        ({"out_channels": 6}, "out_channels 6 must be in_channels, 4"),
    ],
)
def test_configurations_that_diffusers_fails_on_later(changed, words):
    with pytest.raises(ValueError, match=words):
        vkd.reduce_config({**tiny_dit().config, "_class_name": "DiTTransformer2DModel", **changed}, Reduction())


@pytest.mark.parametrize("name", ["QwenImageTransformer2DModel", "ZImageTransformer2DModel", "WanTransformer3DModel"])
def test_other_transformers_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"of {name}; known are UNet2DModel"):
        vkd.reduce_config({"_class_name": name}, Reduction())


# ---- inherited from


def test_evenly_spaced_blocks_known_values():
    assert [evenly_spaced_blocks(count, 28) for count in (1, 2, 4)] == [(0,), (0, 27), (0, 9, 18, 27)]
    assert evenly_spaced_blocks(28, 28) == tuple(range(28))
    for kept, count in itertools.combinations_with_replacement(range(2, 12), 2):
        blocks = evenly_spaced_blocks(kept, count)
        assert (blocks[0], blocks[-1], len(set(blocks))) == (0, count - 1, kept)


@pytest.mark.parametrize("kept", [None, (0, 1, 3)])
def test_a_shallower_student_is_the_teacher_without_some_blocks(kept):
    """Bit for bit what is left when the other blocks hand on what they are given."""
    teacher = tiny_dit(5)
    student = vkd.build_student(teacher, Reduction(blocks=kept or 3))
    inheritance = vkd.inherit_weights(student, teacher, layers=kept and {"transformer_blocks": kept})
    left = copy.deepcopy(teacher)
    left.transformer_blocks = torch.nn.ModuleList(teacher.transformer_blocks[block] for block in kept or (0, 2, 4))
    batch = dit_batch()
    arguments = batch["noise"], batch["timesteps"], batch["conditioning"]["class_labels"]
    assert torch.equal(student.eval()(*arguments).sample, left.eval()(*arguments).sample)
    assert not inheritance.random
    assert f"transformer_blocks.2 <- transformer_blocks.{(kept or (0, 2, 4))[2]}\n" in f"{inheritance}\n"
    assert len(str(inheritance).splitlines()) < 5


def test_positions_of_a_student_of_half_the_width_are_the_teachers():
    """The sines on the channels that are kept, against diffusers' own table for the student's width."""
    teacher, student = tiny_dit(1, 4), tiny_dit(1, 2)
    index = nearest_positions(32, 16)
    assert torch.equal(teacher.pos_embed.pos_embed[..., index], student.pos_embed.pos_embed)
    assert nearest_positions(12, 8).tolist() == [0, 2, 3, 5, 6, 8, 9, 11]  # by hand: 0 and 1.5, rounded to 2, of 3
    assert torch.equal(nearest_positions(16, 16), torch.arange(16))


@pytest.mark.parametrize("channels", ["activation", "magnitude", "first", "random"])
def test_a_student_of_the_teachers_width_is_sliced_exactly(channels):
    """The links cover every weight: with all channels kept, slices are the teacher's weights."""
    teacher, student = tiny_dit(3), tiny_dit(2, seed=1)
    links = link_blocks(student, teacher, (0, 2))
    covered = {name for link in links for name, module in student.named_modules() if module is link.student}
    assert covered == {name.rpartition(".")[0] for name, _ in student.named_parameters()}
    choose_channels(links, channels, readings={})
    with torch.no_grad():
        for link in links:
            _slice(link, fan_in=False)
    expected = tiny_dit(2, seed=2)
    vkd.families.blocks.copy_blocks(expected, teacher, (0, 2))
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("channels", ["activation", "magnitude"])
def test_a_narrower_student_starts_nearer_to_the_teacher(channels, schedule):
    """Than random weights; and fitted in closed form nearer than sliced."""
    teacher, batches = tiny_dit(3, 4), [dit_batch(64, seed=seed) for seed in range(4)]
    errors = {}
    for start in ("random", "none", "least_squares"):
        student = vkd.build_student(teacher, Reduction(width=0.5, blocks=2))
        if start != "random":
            options = {"channels": channels, "batches": batches, "schedule": schedule}
            inheritance = vkd.inherit_weights(student, teacher, rescaling=start, **options)
            assert not inheritance.random
            assert bool(inheritance.fitted) == (start == "least_squares")
        errors[start] = step0_error(student, teacher, [dit_batch(64, seed=9)], schedule)
    assert errors["least_squares"] < errors["none"] < errors["random"]
    assert errors["least_squares"] < 0.5 * errors["random"]


def test_a_wider_student_is_the_teacher_several_times(schedule):
    """Before positions: twice the heads from twice the channels."""
    teacher, batches = tiny_dit(2, 1), [dit_batch(32)]
    student = vkd.build_student(teacher, Reduction(width=2.0))
    inheritance = vkd.inherit_weights(student, teacher, batches=batches, schedule=schedule)
    assert not inheritance.random
    assert step0_error(student, teacher, batches, schedule) < 1


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"transformer_blocks": (0,)}, "1 blocks are named for a student of 2"),
        ({"transformer_blocks": (0, 9)}, "there is no block 9"),
        ({"down_blocks.0": (0, 1)}, "blocks are called transformer_blocks, not down_blocks.0"),
    ],
)
def test_blocks_that_cannot_be_inherited(layers, words):
    with pytest.raises(ValueError, match=words):
        vkd.inherit_weights(tiny_dit(2), tiny_dit(4), layers=layers)


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("heads", [1, 2])
def test_a_student_without_variance_keeps_the_prediction(heads, patch_size, schedule):
    """Of the teacher's output, of several positions in a row where patches are larger, half of the channels."""
    teacher = tiny_dit(2, 2, patch_size=patch_size)
    student, whole = (tiny_dit(2, heads, patch_size=patch_size, learned_variance=known) for known in (False, True))
    for network in (student, whole):
        vkd.inherit_weights(network.eval(), teacher, channels="first")
    batch = dit_batch()
    arguments = batch["noise"], batch["timesteps"], batch["conditioning"]["class_labels"]
    assert torch.equal(student(*arguments).sample, whole(*arguments).sample[:, :4])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"patch_size": 2}, "patch_size 2 cannot start from the weights of a teacher with 1"),
        ({"head_dim": 16}, "attention_head_dim 16 cannot start"),
        ({"num_classes": 11}, "num_embeds_ada_norm 11 cannot start"),
        ({"attention_bias": False}, "attention_bias False cannot start"),
    ],
)
def test_students_that_cannot_start_from_the_teacher(config, words):
    with pytest.raises(ValueError, match=words):
        vkd.inherit_weights(tiny_dit(2, **config), tiny_dit(2))
    with pytest.raises(ValueError, match="out_channels 8 cannot start from the weights of a teacher with 4"):
        vkd.inherit_weights(tiny_dit(2), tiny_dit(2, learned_variance=False))


def test_weights_of_another_architecture():
    with pytest.raises(ValueError, match="a UNet2DModel cannot start from the weights of a DiTTransformer2DModel"):
        vkd.inherit_weights(tiny_unet(), tiny_dit())
    with pytest.raises(ValueError, match="a DiTTransformer2DModel cannot start"):
        vkd.best_layers(tiny_dit(), tiny_unet(), [], None)


def test_networks_and_pipelines_that_are_no_family():
    """Alike in shape, of another class; and a pipeline in place of its part."""
    other = PixArtTransformer2DModel(2, 8, 4, num_layers=1, cross_attention_dim=16, caption_channels=8, sample_size=4)
    with pytest.raises(ValueError, match=r"a PixArtTransformer2DModel is neither .* nor a DiTTransformer2DModel$"):
        vkd.FrozenTeacher(other)
    with pytest.raises(ValueError, match=r"a SimpleNamespace .* pass its `.transformer`"):
        family_of(SimpleNamespace(transformer=other))


def test_best_layers_are_never_worse_than_evenly_spaced_ones(schedule):
    """A teacher whose blocks 1 and 2 alone do something: these are kept, where even spacing would keep 0, 2 and 4."""
    teacher, batches = tiny_dit(5), [dit_batch(seed=seed) for seed in range(2)]
    for block in (0, 3, 4):
        for layer in (teacher.transformer_blocks[block].attn1.to_out[0], teacher.transformer_blocks[block].ff.net[2]):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    student = vkd.build_student(teacher, Reduction(blocks=3))
    layers = vkd.best_layers(student, teacher, batches, schedule)
    assert layers == {"transformer_blocks": (0, 1, 2)}
    vkd.inherit_weights(student, teacher, layers=layers)
    assert step0_error(student, teacher, batches, schedule) < 1e-12
    whole = vkd.build_student(teacher, Reduction())
    assert vkd.best_layers(whole, teacher, batches, schedule) == {"transformer_blocks": (0, 1, 2, 3, 4)}


# ---- distilled


@pytest.mark.parametrize("layers", EVERY_LAYER)
@pytest.mark.parametrize("heads", [1, 2])
def test_a_step_reaches_every_paired_block(schedule, heads, layers):
    student, teacher = tiny_dit(2, heads, seed=1), tiny_dit(4)
    only_features = vkd.LossWeights(denoising=0, output=0, feature=1)
    losses, projected = distil(student, teacher, dit_batch(), schedule, layers, weights=only_features)
    losses["total"].backward()
    for block in student.transformer_blocks:
        assert block.attn1.to_q.weight.grad.abs().sum() > 0
    assert len([name for name in losses if name.startswith("feature/")]) == 2
    assert isinstance(projected.state_dict(), dict)


def test_every_parameter_trains(schedule):
    student = tiny_dit(2, seed=1)
    distil(student, tiny_dit(4), dit_batch(), schedule)[0]["total"].backward()
    assert all(value.grad is not None and value.grad.any() for value in student.parameters())


def test_gradient_checkpointing_gives_the_same_losses(schedule):
    found = []
    for checkpointing in (False, True):
        student = tiny_dit(2, 1, seed=1)
        if checkpointing:
            student.enable_gradient_checkpointing()
        losses, projected = distil(student, tiny_dit(4), dit_batch(), schedule)
        losses["total"].backward()
        found.append((losses["total"].detach(), projected.student.pos_embed.proj.weight.grad))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


def test_compiled_as_one_graph_gives_the_same_losses(schedule):
    student, teacher, batch = tiny_dit(2, 1, seed=1), tiny_dit(4), dit_batch()
    losses, projected = distil(student, teacher, batch, schedule)
    compiled = torch.compile(projected, backend="aot_eager", fullgraph=True)
    frozen = vkd.FrozenTeacher(teacher, [pair.teacher for pair in projected.layer_pairs])
    found = vkd.distillation_losses(
        compiled, batch, schedule=schedule, teacher=frozen.compiled(backend="aot_eager", fullgraph=True)
    )
    torch.testing.assert_close(found["total"], losses["total"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiled_by_inductor_gives_the_same_losses(schedule):
    student, teacher, batch = tiny_dit(2, 1, seed=1), tiny_dit(4), dit_batch()
    losses, projected = distil(student, teacher, batch, schedule)
    frozen = vkd.FrozenTeacher(teacher, [pair.teacher for pair in projected.layer_pairs]).compiled(fullgraph=True)
    found = vkd.distillation_losses(torch.compile(projected, fullgraph=True), batch, schedule=schedule, teacher=frozen)
    torch.testing.assert_close(found["total"], losses["total"], rtol=1e-5, atol=1e-6)


def test_flow_matching_is_distilled_at_its_own_times():
    """Teacher and student of flow are told times in 0 to 1,000, and the loss is of noise - sample."""
    schedule = vkd.Schedule.of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    student, teacher, batch = tiny_dit(2, seed=1), tiny_dit(4), dit_batch()
    crossing = vkd.schedule.Crossing.between(schedule, schedule)
    frozen = vkd.FrozenTeacher(teacher, prediction_type="flow_prediction", crossing=crossing)
    projected = vkd.ProjectedStudent(student, schedule=schedule)
    weights = vkd.LossWeights(denoising=1, output=1, feature=0)
    losses = vkd.distillation_losses(projected, batch, schedule=schedule, teacher=frozen, weights=weights)
    sigma = schedule.sigma[batch["timesteps"]].view(-1, 1, 1, 1)
    noisy = (1 - sigma) * batch["sample"] + sigma * batch["noise"]
    told = 1000 * sigma.flatten(), batch["conditioning"]["class_labels"]
    with torch.no_grad():
        answers = [network(noisy, *told).sample[:, :4] for network in (student.eval(), teacher)]
    expected = {"denoising": batch["noise"] - batch["sample"], "output": answers[1]}
    for name, target in expected.items():
        assert losses[name].item() == pytest.approx((answers[0] - target).square().mean().item(), rel=1e-4)


def test_held_out_errors_of_models_on_several_schedules():
    """Each as if it were alone; and of one by flow matching as the formulas say."""
    teacher = Model(tiny_dit_pipeline(num_layers=2))
    students = {
        "flow": teacher.around(tiny_dit(2, seed=1), "flow_prediction"),
        "epsilon": teacher.around(tiny_dit(2, seed=2)),
    }
    samples = FixedLatents(dit_batch(6))
    together = held_out_errors({"teacher": teacher, **students}, samples, teacher=teacher, num_draws=6)
    for name, student in students.items():
        alone = held_out_errors({"teacher": teacher, name: student}, samples, teacher=teacher, num_draws=6)
        assert together[name] == alone[name]
    assert together["teacher"]["teacher_distance"] == 0
    (batch,) = Draws(samples, teacher.schedule, seed=1_000_003).first(6)
    schedule, crossing = (
        students["flow"].schedule,
        vkd.schedule.Crossing.between(students["flow"].schedule, teacher.schedule),
    )
    timesteps = batch["timesteps"].clamp(schedule.first, schedule.last)
    alpha, sigma = (part[timesteps].view(-1, 1, 1, 1) for part in (schedule.alpha, schedule.sigma))
    noisy, labels = alpha * batch["sample"] + sigma * batch["noise"], batch["conditioning"]["class_labels"]
    scale = crossing.scale[timesteps].view(-1, 1, 1, 1)
    with torch.no_grad():
        epsilon = teacher.network.eval()(scale * noisy, crossing.times[timesteps], labels).sample[:, :4]
        answer = students["flow"].network.eval()(noisy, schedule.times[timesteps], labels).sample[:, :4]
    expected = {
        "denoising_error": batch["noise"] - batch["sample"],
        "teacher_distance": epsilon - (noisy - sigma * epsilon) / alpha,
    }
    for name, target in expected.items():
        assert together["flow"][name] == pytest.approx((answer - target).square().mean().item(), rel=1e-4)


class FixedLatents:
    """Samples of latents in memory, with labels."""

    random_flip, guidance_dropout, buckets = False, 0.0, None

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["sample"])

    def read(self, index):
        return index

    def shape(self, item):
        return tuple(self.batch["sample"].shape[1:])

    def draw(self, item, generator):
        return self.batch["sample"][item]

    def tell(self, item, generator):
        return {"class_labels": self.batch["conditioning"]["class_labels"][item]}

    def finish(self, batch):
        return batch

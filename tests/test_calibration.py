import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from tests.conftest import make_batch, tiny_condition_unet, tiny_unet
from vkd_gen.calibration import calibrate
from vkd_gen.distillation import FrozenTeacher
from vkd_gen.schedule import Schedule

LAYERS = ["down_blocks.0", "mid_block", "up_blocks.0.resnets.1"]
FIELDS = ["mean", "share", "covariance", "layer_norm_covariance"]


def make_teacher(layers=LAYERS):
    return FrozenTeacher(tiny_unet(), layers)


def make_batches(sizes=(6, 3, 8)):
    """Uneven batches, with timesteps everywhere."""
    batches = [make_batch(size, seed=seed) for seed, size in enumerate(sizes)]
    timesteps = torch.linspace(0, 999, sum(sizes)).long()[torch.randperm(sum(sizes))].split(list(sizes))
    return [{**batch, "timesteps": part} for batch, part in zip(batches, timesteps, strict=True)]


def joined(batches):
    return {name: torch.cat([batch[name] for batch in batches]) for name in ("sample", "noise", "timesteps")}


class GivenFeatures:
    """A teacher whose features are known: as many of the given ones as the batch has samples."""

    def __init__(self, features):
        self.features = features

    def __call__(self, noisy_sample, timesteps, conditioning=None):
        return noisy_sample, {"layer": self.features[: len(noisy_sample)]}


def given_batch(timesteps):
    timesteps = torch.tensor(timesteps)
    shape = (len(timesteps), 1, 2, 2)
    return {"sample": torch.zeros(shape), "noise": torch.zeros(shape), "timesteps": timesteps}


def numpy_statistics(rows, timesteps, num_bins):
    """Two passes in float64 over the rows `[B, N, C]`: first the means, then what lies around them."""
    rows = rows.double().numpy()
    channels = rows.shape[-1]
    bins = np.floor(timesteps.numpy() * num_bins / 1000).astype(int)
    members = [rows[bins == index].reshape(-1, channels) for index in range(num_bins)]
    mean = np.stack([part.mean(0) for part in members])
    centred = np.concatenate([part - part.mean(0) for part in members])
    flat = rows.reshape(-1, channels)
    normed = (flat - flat.mean(1, keepdims=True)) / np.sqrt(flat.var(1, keepdims=True) + 1e-5)
    return {
        "mean": mean,
        "share": np.array([len(part) for part in members]) / len(flat),
        "covariance": np.einsum("ni,nj->ij", centred, centred) / len(flat),
        "layer_norm_covariance": np.cov(normed.T, bias=True),
    }


def assert_statistics(statistics, expected, tolerance):
    """Errors relative to the largest entry."""
    for name in FIELDS:
        actual, wanted = getattr(statistics, name), expected[name]
        assert actual.dtype == torch.float64
        np.testing.assert_allclose(actual.numpy(), wanted, rtol=0, atol=tolerance * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("num_bins", [1, 3])
def test_calibrate_equals_a_direct_computation(num_bins, schedule):
    batches = make_batches()
    statistics = calibrate(make_teacher(), batches, schedule, num_timestep_bins=num_bins)
    assert list(statistics) == LAYERS

    batch = joined(batches)
    signal = DDPMScheduler().alphas_cumprod[batch["timesteps"]].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * batch["sample"] + (1 - signal).sqrt() * batch["noise"]
    features = {}
    unet = tiny_unet().eval()
    for layer in LAYERS:
        unet.get_submodule(layer).register_forward_hook(
            lambda _m, _i, output, layer=layer: features.update(
                {layer: output[0] if isinstance(output, tuple) else output}
            )
        )
    with torch.no_grad():
        unet(noisy, batch["timesteps"])
    for layer in LAYERS:
        rows = features[layer].permute(0, 2, 3, 1).flatten(1, 2)
        assert_statistics(statistics[layer], numpy_statistics(rows, batch["timesteps"], num_bins), 1e-5)


def test_calibrate_known_values(schedule):
    """Two samples of two rows each. Bin 0 holds (0, 0), (2, 0): mean (1, 0); bin 1 (5, 1), (5, 3): mean (5, 2).
    Around the means: (-1, 0), (1, 0), (0, -1), (0, 1), so the covariance is the identity times a half."""
    teacher = GivenFeatures(torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[5.0, 1.0], [5.0, 3.0]]]))
    statistics = calibrate(teacher, [given_batch([10, 999])], schedule, num_timestep_bins=2)["layer"]
    assert statistics.mean.tolist() == [[1, 0], [5, 2]]
    assert statistics.share.tolist() == [0.5, 0.5]
    assert statistics.covariance.tolist() == [[0.5, 0], [0, 0.5]]
    # Two channels, layer-normed, are (-1, 1), (1, -1) or (0, 0): here (0, 0) once and (1, -1) three times.
    expected = np.cov(np.array([[0.0, 0.0], [1, -1], [1, -1], [1, -1]]).T, bias=True)
    np.testing.assert_allclose(statistics.layer_norm_covariance.numpy(), expected, atol=1e-4)


def test_shares_count_rows(schedule):
    teacher = GivenFeatures(torch.randn(4, 3, 5))
    batches = [given_batch([0, 100, 900, 350]), given_batch([700, 0])]
    statistics = calibrate(teacher, batches, schedule, num_timestep_bins=3)["layer"]
    np.testing.assert_allclose(statistics.share.numpy(), np.array([3, 1, 2]) / 6, rtol=1e-14)


def test_calibrate_is_stable_far_from_zero(schedule):
    """Mean / standard deviation of 10 000: in float32 the sum of squares would keep no digit of the covariance."""
    rows = 0.1 * torch.randn(8, 20, 4) @ torch.randn(4, 4) + 1000
    timesteps = torch.arange(8) * 125
    teacher = GivenFeatures(rows)
    statistics = calibrate(teacher, [given_batch(timesteps.tolist())], schedule, num_timestep_bins=2)["layer"]
    expected = numpy_statistics(rows, timesteps, 2)
    assert np.abs(expected["covariance"]).max() < 1
    np.testing.assert_allclose(statistics.covariance.numpy(), expected["covariance"], atol=1e-6)
    np.testing.assert_allclose(statistics.mean.numpy(), expected["mean"], rtol=1e-12)


def test_calibrate_passes_the_conditioning(schedule):
    teacher = FrozenTeacher(tiny_condition_unet(), ["mid_block", "down_blocks.0.attentions.0.transformer_blocks.0"])
    batch = make_batch(4, channels=4)
    batch["timesteps"] = torch.tensor([0, 300, 600, 999])

    def mean(tokens):
        conditioned = {**batch, "conditioning": {"encoder_hidden_states": tokens}}
        return calibrate(teacher, [conditioned], schedule, num_timestep_bins=2)

    first, second = mean(torch.zeros(4, 3, 8)), mean(torch.ones(4, 3, 8))
    assert first["mid_block"].mean.shape == (2, 16)
    assert first["down_blocks.0.attentions.0.transformer_blocks.0"].mean.shape == (2, 8)
    assert not torch.allclose(first["mid_block"].mean, second["mid_block"].mean)


def test_bins_follow_the_schedule():
    """100 training timesteps: the second of two bins starts at 50."""
    teacher = GivenFeatures(torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]]))
    batch = given_batch([49, 50])
    statistics = calibrate(teacher, [batch], Schedule.of(DDPMScheduler(num_train_timesteps=100)), num_timestep_bins=2)[
        "layer"
    ]
    assert statistics.mean.tolist() == [[1, 0], [3, 0]]
    with pytest.raises(ValueError, match="too few samples"):
        calibrate(teacher, [batch], Schedule.of(DDPMScheduler(num_train_timesteps=1000)), num_timestep_bins=2)


def test_calibrate_leaves_the_teacher_alone(schedule):
    teacher = make_teacher()
    before = {name: value.clone() for name, value in teacher.unet.state_dict().items()}
    statistics = calibrate(teacher, make_batches(), schedule, num_timestep_bins=2)
    assert all(torch.equal(value, before[name]) for name, value in teacher.unet.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.unet.parameters())
    assert not any(getattr(entry, name).requires_grad for entry in statistics.values() for name in FIELDS)


# Saving


# Errors


@pytest.mark.parametrize("num_bins", [0, -3])
def test_calibrate_needs_a_bin(num_bins, schedule):
    with pytest.raises(ValueError, match=f"num_timestep_bins must be at least 1, not {num_bins}"):
        calibrate(make_teacher(), make_batches(), schedule, num_timestep_bins=num_bins)


def test_calibrate_needs_a_sample_in_every_bin(schedule):
    batch = {**make_batch(4), "timesteps": torch.tensor([0, 10, 500, 510])}
    assert calibrate(make_teacher(), [batch], schedule, num_timestep_bins=2)
    with pytest.raises(ValueError, match="too few samples to calibrate on: not every one of 4"):
        calibrate(make_teacher(), [batch], schedule, num_timestep_bins=4)


def test_calibrate_needs_batches(schedule):
    with pytest.raises(ValueError, match="too few samples"):
        calibrate(make_teacher(), [], schedule)


def test_calibrate_needs_layers(schedule):
    with pytest.raises(ValueError, match="layer"):
        calibrate(make_teacher(layers=[]), make_batches(), schedule, num_timestep_bins=1)

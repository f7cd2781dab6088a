"""The maker of small Stable Diffusions: tokenizer, whitening, training that is killed and goes on."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the extra text is missing")

from vkd_gen.training.small_diffusion import build_text_teacher, save_tokenizer
from vkd_gen.training.text_options import TextTeacherOptions
from vkd_gen.training.text_training import PartTrainer, encode, hold_run, whiten_latents

CAPTIONS = ["red heart", "purple heart", "orange circle", "large orange diamond", "it\u2019s a jalape\u00f1o"]
TINY = TextTeacherOptions(
    vae_channels=(8, 8, 8),
    unet_channels=(16, 16),
    text_width=16,
    vocab_size=540,
    vae_steps=3,
    decoder_steps=3,
    max_train_steps=3,
    train_batch_size=2,
    checkpointing_seconds=0,
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(CAPTIONS, TINY, folder)
    return build_text_teacher(TINY, folder)


def test_tokenizer_reads_what_it_was_made_of(pipeline):
    tokenizer = pipeline.tokenizer
    assert len(tokenizer) == 540
    assert tokenizer.model_max_length == TINY.max_tokens
    for caption in [*CAPTIONS, "zebra 7 !"]:
        tokens = tokenizer(caption).input_ids
        assert (tokens[0], tokens[-1]) == (538, 539)  # <|startoftext|>, <|endoftext|>
        assert 539 not in tokens[1:-1]  # which also stands for what is not known
        assert tokenizer.decode(tokens, skip_special_tokens=True).replace(" ", "") == caption.replace(" ", "")
    assert "heart</w>" in tokenizer.tokenize("purple heart")  # a common word is one token
    config = pipeline.text_encoder.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (538, 539, 539)
    assert tokenizer("heart", padding="max_length").input_ids[3:] == [539] * (TINY.max_tokens - 3)


def test_tokenizer_does_not_depend_on_the_order_of_captions(tmp_path):
    for name, captions in (("a", CAPTIONS), ("b", CAPTIONS[::-1])):
        save_tokenizer(captions, TINY, tmp_path / name)
    assert (tmp_path / "a/merges.txt").read_text() == (tmp_path / "b/merges.txt").read_text()


def test_random_weights_depend_on_the_seed_alone(tmp_path, pipeline):
    torch.manual_seed(11)
    save_tokenizer(CAPTIONS, TINY, tmp_path)
    again = build_text_teacher(TINY, tmp_path)
    for part in ("vae", "unet", "text_encoder"):
        one, other = getattr(pipeline, part).state_dict(), getattr(again, part).state_dict()
        assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


def test_whitened_latents_have_mean_0_and_variance_1_and_decode_as_before(tmp_path):
    save_tokenizer(CAPTIONS, TINY, tmp_path)
    vae = build_text_teacher(TINY, tmp_path).vae
    pixels = torch.rand(6, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        mean, std = encode(vae, pixels)
        before = vae.decode(mean).sample
        relative = std / mean.std((0, 2, 3), keepdim=True)
        whiten_latents(vae, pixels)
        mean, std = encode(vae, pixels)
        torch.testing.assert_close(vae.decode(mean).sample, before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mean.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
    variance = mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))
    torch.testing.assert_close(variance, torch.ones(4), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(std / mean.std((0, 2, 3), keepdim=True), relative, rtol=1e-2, atol=1e-3)


def train(folder, steps, fails_at=None):
    """A linear map trained for some steps; its loss fails at one."""
    torch.manual_seed(0)
    module, calls = nn.Linear(3, 2), []

    def loss_of(numbers, generator):
        calls.append(numbers.tolist())
        if fails_at is not None and len(calls) == fails_at:
            raise KeyboardInterrupt
        return (module(numbers[:, None].float().expand(-1, 3)) - torch.randn(2, generator=generator)).square().mean()

    trainer = PartTrainer(TINY, folder, lambda line: None)
    folder.mkdir(exist_ok=True)
    trainer.train("part", module, loss_of, num_samples=9, steps=steps, learning_rate=0.1)
    return module.state_dict(), calls


def test_training_that_is_killed_ends_as_one_that_is_not(tmp_path):
    straight, calls = train(tmp_path / "straight", 8)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", 8, fails_at=5)
    resumed, later = train(tmp_path / "killed", 8)
    assert later == calls[4:]
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    finished, none = train(tmp_path / "killed", 8)
    assert none == []
    assert all(torch.equal(value, finished[name]) for name, value in straight.items())


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "part.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"part\.pt cannot be gone on from") as error:
        train(tmp_path, 2)
    assert "\n" not in str(error.value)


def test_a_folder_of_another_run_is_refused(tmp_path):
    for _ in range(2):
        with hold_run(tmp_path, {"seed": 0, "teacher": {"vae_steps": 3}}):
            pass
    told = "holds a run with seed 0, not 1: choose another --output_dir"
    with pytest.raises(ValueError, match=told), hold_run(tmp_path, {"seed": 1}):
        pass
    assert json.loads((tmp_path / "options.json").read_text())["seed"] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resolution": 30}, "resolution must be a multiple of 8, not 30"),
        ({"unet_channels": (64, 40)}, "unet_channels must be a multiple of 16, not 40"),
        ({"vocab_size": 100}, "at least 514"),
        ({"vae_steps": 0}, "at least 1"),
        ({"guidance_dropout": 1.0}, "below 1"),
        ({"max_train_steps": 9000}, "learning_rate_steps must be at least --max_train_steps, 9000"),
    ],
)
def test_options_that_make_no_pipeline(fields, message):
    with pytest.raises(ValueError, match=message):
        TextTeacherOptions(**fields)

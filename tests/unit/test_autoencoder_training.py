"""Pretraining of the autoencoder: the patch-adversarial term, and what the decoder's phase leaves as it is."""

import csv

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from pretrain import train_autoencoder, train_tiny_decoder
from pretrain.adversarial import AdversarialTerm, PatchDiscriminator, adaptive_weight, hinge_loss


def test_hinge_loss_is_its_closed_form():
    assert hinge_loss(torch.tensor([2.0, 1.0]), torch.tensor([-1.0, -3.0])) == 0
    assert hinge_loss(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])) == 0.5 * (0.5 + 1.5)


def test_the_adaptive_weight_is_the_ratio_of_gradients():
    layer = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    weight = adaptive_weight(layer.square().sum(), 0.5 * layer[0], layer)
    assert weight.item() == pytest.approx(10 / 0.5, rel=1e-3) and not weight.requires_grad
    assert adaptive_weight(1e9 * layer.sum(), 0 * layer.sum(), layer) == 1e4


def test_a_score_sees_a_patch():
    """34 px: what lies farther away does not change a score but by the normalisation, which is left out here."""
    net = PatchDiscriminator().eval()
    norms = [index for index, layer in enumerate(net.layers) if isinstance(layer, torch.nn.GroupNorm)]
    for index in norms:
        net.layers[index] = torch.nn.Identity()
    pictures = torch.zeros(1, 3, 64, 64, requires_grad=True)
    scores = net(pictures)
    scores[0, 0, 7, 7].backward()
    rows = pictures.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == 34 and scores.shape[2:] == (14, 14)


def test_the_discriminator_learns_and_the_decoder_is_pushed():
    """Grey is told from noise in a few steps; then the term's gradient leads grey towards what is taken for real."""
    term = AdversarialTerm(weight=1, warmup=1, learning_rate=2e-3)
    rng = torch.Generator().manual_seed(0)
    real = torch.rand(4, 3, 32, 32, generator=rng) * 2 - 1
    layer = torch.nn.Parameter(torch.zeros(1, 3, 32, 32))
    fake = layer.expand(4, -1, -1, -1)
    losses = [term.train_discriminator(real, fake).item() for _ in range(30)]
    assert losses[-1] < 0.2 < losses[0]
    before = term.discriminator(fake).mean().item()
    assert term.of_decoder(fake, (layer - 1).square().mean(), layer, 0) == 0, "warm-up"
    term.of_decoder(fake, (layer - 1).square().mean(), layer, 1).backward()
    with torch.no_grad():
        layer -= 0.5 * layer.grad / layer.grad.abs().max()
    assert term.discriminator(layer).mean().item() > before


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Function: train a small decoder on random pictures, in the process, with more words; returns its folder."""
    pictures = np.random.default_rng(0).integers(0, 255, (8, 72, 72, 3), np.uint8)
    held_out = torch.from_numpy(pictures[:2, :64, :64]).permute(0, 3, 1, 2) / 127.5 - 1
    monkeypatch.setattr(train_autoencoder, "load_pictures", lambda args: (pictures[:, 4:68, 4:68], pictures, held_out))
    base = tmp_path / "base"
    vae = AutoencoderKL(block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=4,
                        latent_channels=4, scaling_factor=0.7)  # fmt: skip
    vae.save_pretrained(base)

    def train(name, *words):
        words = ["--init_from", base, "--decoder_steps", 4, "--batch_size", 2, "--adversarial_warmup", 1, *words]
        train_autoencoder.main([str(word) for word in (*words, "--output_dir", tmp_path / name)])
        return tmp_path / name

    return base, train


def test_the_decoder_alone_is_trained_and_resumes(trained, monkeypatch):
    """Encoder, latents and scale stay as they are; a run cut after a saved state ends with the same weights."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="pip install -r requirements-dev.txt")
    base, train = trained
    whole = train("whole", "--adversarial_weight", 0.5, "--save_every", 2)
    before, after = AutoencoderKL.from_pretrained(base), AutoencoderKL.from_pretrained(whole)
    changed = {name for name, value in after.state_dict().items() if not value.equal(before.state_dict()[name])}
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    assert after.config.scaling_factor == 0.7
    plain = AutoencoderKL.from_pretrained(train("plain", "--save_every", 2))
    assert not after.decoder.conv_out.weight.equal(plain.decoder.conv_out.weight), "the term changes the decoder"

    save, calls = train_autoencoder.Progress.save, []

    def save_once(self, *args):
        if calls:
            raise KeyboardInterrupt
        calls.append(save(self, *args))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_autoencoder.Progress, "save", save_once)
        train("cut", "--adversarial_weight", 0.5, "--save_every", 2)
    resumed = AutoencoderKL.from_pretrained(train("cut", "--adversarial_weight", 0.5, "--save_every", 2))
    assert all(value.equal(after.state_dict()[name]) for name, value in resumed.state_dict().items())
    rows = list(csv.reader((whole / "progress.csv").open()))
    assert [int(row[0]) for row in rows] == [14002, 14004]


def test_a_tiny_decoder_is_distilled_and_resumes(trained, tmp_path, monkeypatch):
    """A run that was cut after a saved state ends with the weights of a whole run."""
    pictures = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8)
    monkeypatch.setattr(train_tiny_decoder, "load_pictures", lambda args: (pictures[2:], pictures[:2]))

    def distil(name, *words):
        words = ["--vae", trained[0], "--width", 4, "--batch_size", 4, "--steps", 6, "--save_every", 3, *words]
        train_tiny_decoder.main([str(word) for word in (*words, "--output_dir", tmp_path / name)])
        return AutoencoderTiny.from_pretrained(tmp_path / name).state_dict()

    whole = distil("whole")
    distil("cut", "--minutes", 0)
    assert (tmp_path / "cut" / "progress.csv").read_text().startswith("1,")
    resumed = distil("cut")
    assert all(value.equal(whole[name]) for name, value in resumed.items())
    assert all((value == 0).all() for name, value in whole.items() if name.startswith("encoder."))
    vae = AutoencoderKL.from_pretrained(trained[0])
    before = train_tiny_decoder.build_tiny(vae, width=4, seed=0).decoder.state_dict()
    assert not any(whole[f"decoder.{name}"].equal(value) for name, value in before.items()), "every tensor is trained"
    rows = list(csv.reader((tmp_path / "whole" / "progress.csv").open()))
    assert [int(row[0]) for row in rows] == [3, 6]


def test_a_small_decoder_learns_pictures_and_features(trained):
    vae = AutoencoderKL.from_pretrained(trained[0]).requires_grad_(False)
    latents = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    teacher = train_tiny_decoder.Teacher(vae, latents)
    tiny = train_tiny_decoder.build_tiny(vae, width=8)
    student = train_tiny_decoder.Student(tiny, [mean.shape[1] for mean, _ in teacher.statistics])
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    history = []
    for _ in range(100):
        history.append(train_tiny_decoder.losses(student, teacher, latents))
        sum(history[-1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    (pixels, features), (pixels_now, features_now) = history[0], history[-1]
    assert pixels_now < 0.6 * pixels and features_now < 0.9 * features
    torch.testing.assert_close(student(latents)[0], tiny.decode(latents).sample)

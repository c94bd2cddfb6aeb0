"""The patch-adversarial term of latent diffusion's autoencoders (Rombach et al. 2022, section 3.1 and appendix G).

A small convolutional network judges overlapping patches of pictures, real or reconstructed (the patch discriminator of
Isola et al. 2017). The decoder is trained to be taken for real. The term's weight follows from gradients at the
decoder's last layer, so that it counts as much as the reconstruction does (Esser et al. 2021, equation 7).

Shapes: B pictures of 3 channels, h w patches.
"""

import torch
import torch.nn.functional as F


class PatchDiscriminator(torch.nn.Module):
    """Scores of patches, (B, 1, h, w): high for real ones. Each score sees 34 x 34 px at three stages.

    Group normalisation stands where Isola et al. have batch normalisation: batches of four pictures are too small for
    that.
    """

    def __init__(self, width=32, stages=3):
        super().__init__()
        layers = [torch.nn.Conv2d(3, width, 4, 2, 1), torch.nn.LeakyReLU(0.2)]
        for stage in range(1, stages):
            last = stage == stages - 1
            channels = width * 2 ** (stage - 1), width * 2**stage
            layers += [torch.nn.Conv2d(*channels, 4, 1 if last else 2, 1), torch.nn.GroupNorm(8, channels[1]),
                       torch.nn.LeakyReLU(0.2)]  # fmt: skip
        self.layers = torch.nn.Sequential(*layers, torch.nn.Conv2d(width * 2 ** (stages - 1), 1, 4, 1, 1))

    def forward(self, pictures):
        """Scores of pictures (B, 3, H, W) in [-1, 1]."""
        return self.layers(pictures)


def hinge_loss(real_scores, fake_scores):
    """The discriminator's loss, a scalar: 0 where real patches score above 1 and others below -1."""
    return 0.5 * (F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean())


def adaptive_weight(reconstruction_loss, adversarial_loss, last_layer):
    """Ratio of the gradient norms of both losses at the decoder's last layer, detached, 10,000 at most."""
    norms = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
             for loss in (reconstruction_loss, adversarial_loss)]  # fmt: skip
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()


class AdversarialTerm:
    """The discriminator with its optimizer, and the term that it adds to the decoder's loss.

    Attributes:
        weight: of the term, times the adaptive weight.
        warmup: steps of the decoder's phase in which only the discriminator learns.
    """

    def __init__(self, weight, warmup, seed=0, learning_rate=2e-4):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.discriminator = PatchDiscriminator()
        self.optimizer = torch.optim.AdamW(
            self.discriminator.parameters(), lr=learning_rate, betas=(0.5, 0.9), weight_decay=0
        )
        self.weight, self.warmup = weight, warmup

    def of_decoder(self, reconstruction, reconstruction_loss, last_layer, step):
        """What is added to the decoder's loss, a scalar; 0 during the warm-up. step: of the decoder's phase."""
        if step < self.warmup:
            return torch.zeros(())
        adversarial_loss = -self.discriminator(reconstruction).mean()
        return self.weight * adaptive_weight(reconstruction_loss, adversarial_loss, last_layer) * adversarial_loss

    def train_discriminator(self, pictures, reconstruction):
        """One step of the discriminator; returns its loss."""
        self.optimizer.zero_grad()
        loss = hinge_loss(self.discriminator(pictures), self.discriminator(reconstruction.detach()))
        loss.backward()
        self.optimizer.step()
        return loss.detach()

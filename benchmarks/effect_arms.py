"""The arms of the experiment on LPL's effect: flags of the training scripts, and what each arm is for."""

from dataclasses import dataclass

BASES = {"epsilon": "sdxl", "v_prediction": "sdxl", "flow": "sd3"}
STARTS = dict.fromkeys(BASES, "009000")  # the averages from which the arms of the verdict start
SCRIPTS = {"sdxl": "train_sdxl_lpl.py", "sd3": "train_sd3_lpl_flow.py"}

COMMON = "--resolution 64 --center_crop --train_batch_size 32 --learning_rate 2e-4 " \
    "--lr_scheduler constant_with_warmup --lr_warmup_steps 20 --use_ema --ema_decay 0.999 --adam_weight_decay 0.01 " \
    "--proportion_empty_prompts 0.1 --mixed_precision no --report_to none --checkpointing_steps 250 " \
    "--checkpoints_total_limit 1"  # fmt: skip
FAMILY_FLAGS = {"sdxl": "--snr_gamma 5", "sd3": ""}
GATE = "--use_lpl --lpl_share 0.2 --lpl_sigma_threshold 3"
_FULL = f"{GATE} --lpl_norm_gradient full"
_CLASSIFIER = "--lpl_classifier examples/tiny-classifier"  # of the tiny SDXL's latents
DEFAULTS = {  # flow's own gate is 3, as in the other arms, so its default arm has SDXL's gate
    "sdxl": "--use_lpl",
    "sd3": "--use_lpl --lpl_t_threshold 200",
}


@dataclass(frozen=True)
class Arm:
    """A way to fine-tune.

    Attributes:
        flags: of the training script; {family} stands for the base's, sdxl or sd3, {defaults} for its `DEFAULTS`.
        profile: whether each sample is weighted so that its mean at each noise level is that of decoder features.
        start: part of the steps after which the perceptual loss begins.
        autoencoder: another one, a folder in the work folder, whose decoder the loss looks through; None: the base's.
        gain: the arm is no training: it is *none*, and its estimates are scaled while sampling.
    """

    flags: str
    profile: bool = False
    start: float = 0.0
    autoencoder: str | None = None
    gain: bool = False

    def words(self, family, steps):
        """The flags of this arm, as words."""
        flags = self.flags.format(family=family, defaults=DEFAULTS[family])
        return flags.split() + (["--lpl_start", str(round(self.start * steps))] if self.start else [])


ARMS = {
    "none": Arm(""),
    "default": Arm("{defaults}"),
    "default-full": Arm("{defaults} --lpl_norm_gradient full"),
    "latent": Arm(f"{GATE} --lpl_features latent", profile=True),
    "latent-full": Arm(f"{GATE} --lpl_features latent --lpl_norm_gradient full", profile=True),
    "decoder": Arm(GATE),
    "decoder-half": Arm(f"{GATE} --lpl_norm_gradient half"),
    "decoder-full": Arm(_FULL),
    "target": Arm(f"{GATE} --lpl_norm_type target"),
    "gate-1": Arm("--use_lpl --lpl_share 0.2 --lpl_sigma_threshold 1"),
    "rgb": Arm(f"{GATE} --lpl_features rgb"),
    "gain": Arm("", gain=True),
    # decoder-full with one thing changed: the checks that the bar asks for
    "decoder-full-share-0.05": Arm(f"{_FULL} --lpl_share 0.05"),
    "decoder-full-share-0.4": Arm(f"{_FULL} --lpl_share 0.4"),
    "decoder-full-gate-1": Arm(f"{_FULL} --lpl_sigma_threshold 1"),
    "decoder-full-blocks-2": Arm(f"{_FULL} --lpl_num_blocks 2"),  # the gradient of all four, nearly, for half the time
    # other networks in the decoder's place, with the gradient of decoder-full
    "classifier": Arm(f"{_FULL} --lpl_features classifier {_CLASSIFIER}"),
    # with a share, the later flag wins, at which its gradient is half as large as that of decoder-full
    "classifier-light": Arm(f"{_FULL} --lpl_share 0.05 --lpl_features classifier {_CLASSIFIER}"),
    "tiny-decoder": Arm(
        f"{_FULL} --lpl_features tiny_decoder --lpl_tiny_decoder examples/tiny-{{family}}-decoder --lpl_num_blocks 2"
    ),
    "decoder-and-classifier": Arm(f"{_FULL} --lpl_features decoder classifier {_CLASSIFIER}"),
}
FINALIST = "decoder-full"  # the arm with LPL that the fresh seeds judge, chosen on seed 0
TWINS = {"decoder": "latent", "decoder-full": "latent-full"}  # an arm, and the same without features

_NO_GATE = "--use_lpl --lpl_share 0.2"
_NO_SHARE = "--use_lpl --lpl_sigma_threshold 3"
_RANK = "--use_lora --learning_rate 1e-3 --rank"
ABLATIONS = {
    **{f"blocks-{count}": Arm(f"{GATE} --lpl_num_blocks {count}") for count in range(4)},
    **{f"norm-{kind}": Arm(f"{GATE} --lpl_norm_type {kind}") for kind in ("shared", "default", "batch", "none")},
    **{f"gate-{limit}": Arm(f"{_NO_GATE} --lpl_sigma_threshold {limit}") for limit in ("0.57", "6", "20")},
    **{f"share-{share}": Arm(f"{_NO_SHARE} --lpl_share {share}") for share in ("0.05", "0.1", "0.4")},
    "equal-depths": Arm(f"{GATE} --no-lpl_pow_law"),
    "outliers": Arm(f"{GATE} --no-lpl_remove_outliers"),
    "outliers-fixed": Arm(f"{GATE} --lpl_outlier_reference_resolution 0"),
    "l1": Arm(f"{GATE} --lpl_loss_type l1"),
    "second-half": Arm(GATE, start=0.5),
    "last-fifth": Arm(GATE, start=0.8),
    "adversarial": Arm(GATE, autoencoder="vae-adversarial"),
    **{f"rank-{rank}": Arm(f"{_RANK} {rank}") for rank in (4, 16)},
    **{f"rank-{rank}-decoder": Arm(f"{_RANK} {rank} {GATE}") for rank in (4, 16)},
}  # of 400 steps, beside none, decoder, decoder-half, decoder-full, target, gate-1 and rgb of as many
ALL = ARMS | ABLATIONS

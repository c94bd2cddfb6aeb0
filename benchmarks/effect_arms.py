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
# Every value that matters is given: the scripts' defaults followed from the results.
_LPL = "--use_lpl --lpl_share 0.2 --lpl_norm_gradient none"
GATE = f"{_LPL} --lpl_sigma_threshold 3"
_FULL = f"{GATE} --lpl_norm_gradient full"
_CLASSIFIER = "--lpl_classifier examples/tiny-classifier"  # of the tiny SDXL's latents


@dataclass(frozen=True)
class Arm:
    """A way to fine-tune.

    Attributes:
        flags: of the training script; {family} stands for the base's, sdxl or sd3.
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
        flags = self.flags.format(family=family)
        return flags.split() + (["--lpl_start", str(round(self.start * steps))] if self.start else [])


def options_of(words):
    """{flag: values} of the words of a command line: the last of each flag."""
    found, flag = {}, None
    for word in words:
        flag = word if word.startswith("--") else flag
        found[flag] = [] if word == flag else [*found[flag], word]
    return found


ARMS = {
    "none": Arm(""),
    "default": Arm(f"{_LPL} --lpl_t_threshold 200"),  # the scripts' defaults when the experiment began
    "default-full": Arm(f"{_LPL} --lpl_t_threshold 200 --lpl_norm_gradient full"),
    "latent": Arm(f"{GATE} --lpl_features latent", profile=True),
    "latent-full": Arm(f"{GATE} --lpl_features latent --lpl_norm_gradient full", profile=True),
    "decoder": Arm(GATE),
    "decoder-half": Arm(f"{GATE} --lpl_norm_gradient half"),
    "decoder-full": Arm(_FULL),
    "target": Arm(f"{GATE} --lpl_norm_type target"),
    "gate-1": Arm(f"{_LPL} --lpl_sigma_threshold 1"),
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
FINALIST = "decoder-full"  # the arm with LPL that the fresh seeds judge
TWINS = {"decoder": "latent", "decoder-full": "latent-full"}  # an arm, and the same without features

_RANK = "--use_lora --learning_rate 1e-3 --rank"
ABLATIONS = {  # of 400 steps: decoder-full, or for norm-… decoder, with one thing changed
    **{f"blocks-{count}": Arm(f"{_FULL} --lpl_num_blocks {count}") for count in (0, 1, 3)},
    **{f"norm-{kind}": Arm(f"{GATE} --lpl_norm_type {kind}") for kind in ("shared", "default", "batch", "none")},
    **{f"gate-{limit}": Arm(f"{_FULL} --lpl_sigma_threshold {limit}") for limit in ("0.57", "6", "20")},
    "share-0.1": Arm(f"{_FULL} --lpl_share 0.1"),
    "equal-depths": Arm(f"{_FULL} --no-lpl_pow_law"),
    "outliers": Arm(f"{_FULL} --no-lpl_remove_outliers"),
    "outliers-fixed": Arm(f"{_FULL} --lpl_outlier_reference_resolution 0"),
    "l1": Arm(f"{_FULL} --lpl_loss_type l1"),
    "second-half": Arm(_FULL, start=0.5),
    "last-fifth": Arm(_FULL, start=0.8),
    "adversarial": Arm(_FULL, autoencoder="vae-adversarial"),
    **{f"rank-{rank}": Arm(f"{_RANK} {rank}") for rank in (4, 16)},
    **{f"rank-{rank}-full": Arm(f"{_RANK} {rank} {_FULL}") for rank in (4, 16)},
}  # beside none, decoder, decoder-half, decoder-full, its shares of 0.05 and 0.4, its gate 1, target and rgb
BASELINES = {f"rank-{rank}-full": f"rank-{rank}" for rank in (4, 16)}  # where it is not the first arm
ALL = ARMS | ABLATIONS

"""The count of live bytes: against closed forms, and against the tensors of a step that really runs."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning.training.live_memory import FLOAT32, LOWER, LiveBytes, Peak, cuda_rules
from lpl_finetuning.training.plan import arithmetic_line, format_flop
from lpl_finetuning.training.step_memory import (
    Machine,
    RunCode,
    autoencoder_networks,
    count_step,
    counting_batch,
    flop_of_step,
    highest,
    latent_size,
    tensors_of,
)

SCRIPTS = {"sdxl": train_sdxl_lpl, "sd3": train_sd3_lpl_flow}


def meta(*shape, dtype=torch.float32, grad=False):
    """A tensor on the meta device."""
    return torch.zeros(*shape, dtype=dtype, device="meta", requires_grad=grad)


def test_storages_count_until_they_are_freed():
    with LiveBytes() as counter:
        a = meta(10)
        b = a.view(2, 5).t()  # the same storage
        c = a + 1
        assert counter.total == 80 and counter.peaks["start"].size == 80
        del a
        assert counter.total == 80
        del b
        assert counter.total == 40
        with counter.at("later: here"):
            d = [c * 2, c * 3]
        assert counter.peaks["later"].size == 120 and counter.peaks["later"].where == "later: here"
        counter.hold("weights", d)
        assert counter.live["weights"] == 80
        del c, d
        assert counter.total == 0 and counter.live["weights"] == 0


def test_copies_to_the_host_and_back():
    with LiveBytes() as counter:
        a = meta(10, 3).to("cpu")
        assert a.shape == (10, 3) and counter.total == 0
        a = a.to("meta")
        assert counter.total == 120


def test_storages_of_before_count_when_held():
    weight = meta(100)
    with LiveBytes() as counter:
        counter.hold("weights", [weight, weight[:3]])
        assert counter.total == 400


def test_an_operation_gives_the_dtype_that_it_is_asked_for():
    """The optimizer's state in 8 bits takes a byte for each weight."""
    x = torch.randn(3, 5)
    for make in (lambda x: torch.zeros_like(x, dtype=torch.uint8), lambda x: x.sum(dtype=torch.float64),
                 lambda x: torch.linalg.vector_norm(x, dtype=torch.float64), torch.zeros_like):  # fmt: skip
        with LiveBytes():
            counted = make(x.to("meta"))
        assert (counted.dtype, counted.shape) == (make(x).dtype, make(x).shape)


def test_a_linear_layer_and_its_gradients():
    """Forward: x and y. Backward: the gradients of y and x, and of the weight and bias."""
    layer = torch.nn.Linear(30, 50, device="meta")
    with LiveBytes() as counter:
        counter.hold("weights", layer.parameters())
        x = meta(7, 30, grad=True)
        y = layer(x)
        weights = 4 * (30 * 50 + 50)
        assert counter.total == weights + 4 * 7 * (30 + 50)
        torch.autograd.backward(y, torch.ones_like(y))
        assert counter.total == 2 * weights + 4 * (2 * 7 * 30 + 7 * 50)


def test_arithmetic_of_a_linear_layer_and_a_convolution():
    """A product and its addition are two operations; the gradients of input and weight take as many each."""
    layer = torch.nn.Linear(30, 50, device="meta")
    convolution = torch.nn.Conv2d(4, 6, 3, padding=1, device="meta").requires_grad_(False)
    with LiveBytes() as counter:
        with counter.at("forward: linear"):
            y = layer(meta(7, 30, grad=True))
        with counter.at("backward"):
            torch.autograd.backward(y, torch.ones_like(y))
        with counter.at("frozen"):
            z = convolution(meta(2, 4, 16, 8, grad=True))
            torch.autograd.backward(z, torch.ones_like(z))
    forward = 2 * 7 * 30 * 50
    one = 2 * 2 * 16 * 8 * 6 * 4 * 9
    assert counter.flop == {"forward": forward, "backward": 2 * forward, "frozen": 2 * one}


def test_autocast_copies_weights_until_the_forward_pass_ends():
    """Copies of float32 weights and of the input; afterwards those stay that autograd holds."""
    first, second = (torch.nn.Linear(64, 64, bias=False, device="meta") for _ in range(2))
    frozen = torch.nn.Linear(64, 64, bias=False, device="meta").requires_grad_(False)
    x, square, rows = meta(8, 64), 64 * 64, 8 * 64
    with cuda_rules(), LiveBytes() as counter:
        counter.hold("weights", [x])
        counter.hold("weights", [layer.weight for layer in (first, second, frozen)])
        held = counter.total
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            first(x)
            y = second(first(x))
            assert y.dtype == torch.bfloat16
            assert counter.total == held + 2 * (2 * square + rows), "two copies, and the output"
            frozen(x)
            assert counter.total == held + 2 * (2 * square + rows), "a frozen weight's copy is not kept"
        assert counter.total == held + 2 * rows
        with torch.autocast("cpu", torch.bfloat16):
            y = first(x)
        assert counter.total == held + 2 * (2 * rows), "the input's copy stays for the weight's gradient"


def test_norms_are_in_float32_under_autocast():
    norm = torch.nn.GroupNorm(2, 16, device="meta", dtype=torch.bfloat16)
    with cuda_rules(), LiveBytes(), torch.autocast("cpu", torch.bfloat16):
        assert norm(meta(2, 16, 4, 4, dtype=torch.bfloat16)).dtype == torch.float32
        assert (meta(4, dtype=torch.bfloat16) ** 2).dtype == torch.float32
        assert torch.nn.functional.silu(meta(4, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert (meta(3, 4) @ meta(4, 5)).dtype == torch.bfloat16
    assert norm(meta(2, 16, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_rules_are_those_of_pytorch():
    """PyTorch names the operations of CUDA's autocast in a header that it installs."""
    header = next(iter(torch.__path__)) + "/include/ATen/autocast_mode.h"
    with open(header, encoding="utf-8") as file:
        text = file.read()
    for macro, names in (("AT_FORALL_LOWER_PRECISION_FP(", LOWER), ("AT_FORALL_FP32(", FLOAT32)):
        rules = text.split(f"#define {macro}")[1].split("#define AT_FORALL")[0]
        own = {"__matmul__", "__rmatmul__", "__pow__", "interpolate", "prod", "softmax", "log_softmax", "cumprod",
               "cumsum", "norm", "sum"}  # fmt: skip
        missing = [name for name in names - own if f"_({name})" not in rules and f"_({name}," not in rules]
        assert not missing


@pytest.mark.parametrize(("dtype", "rows"), [(torch.bfloat16, 100), (torch.float32, 128)])
def test_attention_keeps_query_key_value_output_and_sums(dtype, rows):
    """No matrix of S x S. FlashAttention's sums have S rows, those of memory-efficient attention a multiple of 32."""
    batch, heads, length, size = 2, 3, 100, 64
    tensor = batch * heads * length * size * dtype.itemsize
    with cuda_rules(), LiveBytes() as counter:
        q, k, v = (meta(batch, heads, length, size, dtype=dtype, grad=True) for _ in range(3))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        sums = 4 * batch * heads * rows
        assert 4 * tensor + sums <= counter.total < 4 * tensor + sums + 64, "and the seeds of the dropout"
        torch.autograd.backward(out, torch.ones_like(out))
        assert 7 * tensor <= counter.total < 7 * tensor + sums + 64, "and three gradients"


def test_checkpointing_keeps_the_input_alone():
    """The layer's inner tensors are there in the recomputation only."""
    layers = torch.nn.Sequential(*[torch.nn.Linear(64, 64, device="meta") for _ in range(4)]).requires_grad_(False)
    x = meta(100, 64, grad=True)
    block = 4 * 100 * 64
    with cuda_rules(), LiveBytes() as counter:
        counter.hold("weights", [x, *layers.parameters()])
        held = counter.total
        y = checkpoint(lambda x: layers(x).sin().sin().sin(), x, use_reentrant=False)
        assert counter.total == held + block
        with counter.at("backward"):
            torch.autograd.backward(y, torch.ones_like(y))
        assert counter.peaks["backward"].size >= held + 4 * block


FLAGS = {
    "sdxl lora": ("sdxl", "--use_lora --use_lpl"),
    "sdxl lora, stages": ("sdxl", "--use_lora --use_lpl --gradient_checkpointing --lpl_norm_type shared"),
    "sdxl full, EMA": ("sdxl", "--use_lpl --use_ema --gradient_accumulation_steps 2 --validation_split 2"),
    "sdxl held out, no LPL": ("sdxl", "--use_lora --validation_split 2 --validation_metrics"),
    "sdxl text encoders": ("sdxl", "--use_lora --train_text_encoder --gradient_checkpointing --validation_split 2"),
    "sd3 lora": ("sd3", "--use_lora --use_lpl"),
    "sdxl full, 8 bits": ("sdxl", "--use_8bit_adam --gradient_checkpointing"),
    "sd3 full, adafactor": ("sd3", "--optimizer adafactor --gradient_checkpointing"),
    "sd3 prodigy": ("sd3", "--use_lora --validation_split 2 --optimizer prodigy --use_lpl --lpl_batch_size 1"),
}


def count(script, flags, folder, pictures, machine):
    """{phase: Peak} of a step of a tiny model; bytes of a micro-batch and its two kinds of noise on the CPU."""
    words = f"{flags} --mixed_precision no --resolution 128 --train_batch_size 2 --validation_prompt x".split()
    args = script.parse_args(
        [*words, "--pretrained_model_name_or_path", str(folder), "--train_data_dir", str(pictures)]
    )
    plan = SimpleNamespace(
        schedule=script.Schedule(args), dtype=torch.float32, batch_size=2, total_steps=5, first_step=0
    )
    code = RunCode(script.build_denoiser, script.training_step, script.example_batch, autoencoder_networks,
                   script.held_out_functions())  # fmt: skip
    denoiser = script.build_denoiser(args, torch.float32, "meta")
    batch = counting_batch(args, plan, code, machine.encodes, denoiser)
    held = {tensor.untyped_storage()._cdata: tensor.nbytes for tensor in tensors_of(batch)}
    noise = 2 * script.example_batch(denoiser, args, latent_size(args), torch.float32)["mean"].nbytes
    return count_step(args, plan, code, machine), sum(held.values()) + noise


@pytest.mark.parametrize("encodes", [False, True])
@pytest.mark.parametrize("case", [
    pytest.param(case, marks=pytest.mark.slow) if case in ("sdxl text encoders", "sd3 prodigy") else case
    for case in FLAGS
])  # fmt: skip
def test_a_step_on_the_meta_device_counts_what_a_real_step_holds(case, encodes, request, pictures):
    """The same step with real tensors on the CPU, phase by phase."""
    name, flags = FLAGS[case]
    if encodes and case != "sdxl lora":
        pytest.skip("once is enough")
    folder = request.getfixturevalue(f"{name}_folder")
    (computed, host), (real, _) = (
        count(SCRIPTS[name], flags, folder, pictures, Machine("no", encodes=encodes, device=device))
        for device in ("meta", "cpu")
    )
    assert computed.keys() == real.keys()
    assert ("one-step test" in computed) is ("--validation_metrics" in flags)
    assert ("held-out loss" in computed) is ("--validation_split" in flags)
    assert ("LPL" in computed) is ("--use_lpl" in flags or "--validation_split" in flags), "held-out LPL is measured"
    for phase, peak in computed.items():  # on the CPU the loader's batch counts, and the one of the empty prompt
        assert peak.size == pytest.approx(real[phase].size, abs=0.01 * peak.size + 2 * host), phase
        for kind in ("weights", "optimizer state", "EMA", "autoencoder"):
            counted, held = peak.kinds.get(kind, 0), real[phase].kinds.get(kind, 0)
            more = 0.15 if "prodigy" in flags and kind == "optimizer state" else 0.01  # the count knows no values, and
            assert 0.99 * held <= counted <= (1 + more) * held, kind  # Prodigy keeps no copy of LoRA's zeros
    assert highest(computed).size == max(peak.size for peak in computed.values())


@pytest.mark.parametrize(("more", "passes"), [("", 3), ("--lpl_checkpointing stage", 4)])
def test_arithmetic_of_the_loss_is_that_of_the_passes_through_the_decoder(more, passes, sdxl_folder, pictures):
    """Forward for target and estimate, backward to the latents, and under checkpointing the estimate once more.

    PyTorch's own counter counts the decoder, which has a last convolution more than the loss. The rest of a step is
    the UNet's, without what validation samples.
    """
    peaks, _ = count(train_sdxl_lpl, f"--use_lora --use_lpl {more}", sdxl_folder, pictures, Machine("no"))
    vae = AutoencoderKL.from_pretrained(sdxl_folder, subfolder="vae")
    with FlopCounterMode(display=False) as decoding, torch.no_grad():
        decoded = vae.decode(torch.zeros(2, 4, 16, 16)).sample
    last = 2 * decoded.numel() * vae.decoder.conv_out.in_channels * 9
    unet = UNet2DConditionModel.from_pretrained(sdxl_folder, subfolder="unet")
    own = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    more = {"text_embeds": torch.zeros(2, own), "time_ids": torch.zeros(2, 6)}
    with FlopCounterMode(display=False) as predicting, torch.no_grad():
        unet(torch.zeros(2, 4, 16, 16), 1, torch.zeros(2, 77, unet.config.cross_attention_dim), added_cond_kwargs=more)
    step, lpl = flop_of_step(peaks)
    assert 2 < step / predicting.get_total_flops() < 2.5, "forward, backward, and the gradients of the LoRA"
    assert lpl == pytest.approx(passes * (decoding.get_total_flops() - last), rel=0.03)
    for others in ("", "--validation_split 2 --validation_metrics"):  # which look through the decoder too
        peaks_without, _ = count(train_sdxl_lpl, f"--use_lora {others}", sdxl_folder, pictures, Machine("no"))
        assert flop_of_step(peaks_without) == (step, 0)
    line = arithmetic_line(peaks, 2, 0.25)
    assert line.startswith("Arithmetic") and f"{1 + 0.25 * lpl / step:.2f} times" in line
    assert arithmetic_line({"": Peak(5, "", {})}, 2, 0.25) == "", "nothing was counted"


def test_numbers_of_operations_have_units():
    assert [format_flop(flop) for flop in (19.7e12, 2.064e9, 5e6, 12)] == [
        "19.7 TFLOP",
        "2.06 GFLOP",
        "5 MFLOP",
        "12 FLOP",
    ]

"""Train a complete, tiny Stable Diffusion 3 for 64-px pictures from scratch: tokenizers, text encoders, transformer.

    python pretrain/train_autoencoder.py --output_dir pretrain/work/vae-16ch --latent_channels 16 --no-quant_conv
    python pretrain/train_tiny_sd3.py --vae pretrain/work/vae-16ch --output_dir pretrain/work/sd3

The twin of `train_tiny_sdxl.py`: same pictures, captions, flags and files. Rectified flow: z_t = (1 - sigma) z_0 +
sigma eps. The transformer gets 1000 sigma as timestep and returns the velocity eps - z_0 (Stable Diffusion 3, Esser et
al. 2024). Half of the batches are learnt without T5, so the pipeline also works without `text_encoder_3`.

A 64-px picture has 16 tokens. A caption has 77 tokens from CLIP and 77 to 256 from T5, nearly all of them pads. In
training a few pads stand for all pads, in the transformer and in the text encoders. The logarithm of how many pads
each stands for is added to its attention scores. This is the same softmax, except for differences between pads, at a
fraction of the cost.

Letters: B batch, K tokens of the longest caption in a batch, W width of T5 and of the joint attention.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, trainers
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from pretrain.resumable import autocast
from pretrain.tiny_training import (
    SIZE,
    TRAIN_STEPS,
    add_training_arguments,
    build_tokenizers,
    clip_configs,
    encode_pictures,
    finish,
    load_training_pictures,
    sampling_probabilities,
    tokenize,
    train,
)

CLIP_TOKENS = 77
T5_TOKENS = (77, 256)  # lengths that training scripts and the pipeline use
STAND_INS = 4  # pads that stand for all pads of a text encoder


def parse_args(argv=None):
    """Command-line arguments; with --hold_out the defaults trained the shipped weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser, steps=9000, batch_size=64)
    parser.add_argument("--vae", required=True, help="folder of the 16-channel autoencoder")
    parser.add_argument("--layers", type=int, default=3, help="of the transformer; its width is 64 times this")
    parser.add_argument("--text_width", type=int, default=64, help="of each of the two CLIP text encoders")
    parser.add_argument("--text_layers", type=int, default=3)
    parser.add_argument("--t5_width", type=int, default=144, help="at least twice --text_width")
    parser.add_argument("--t5_layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=1000, help="tokens, the 512 bytes and two specials included")
    parser.add_argument("--t5_vocabulary", type=int, default=600, help="tokens, ASCII and three specials included")
    parser.add_argument("--caption_dropout", type=float, default=0.1, help='share of captions that become ""')
    parser.add_argument("--t5_dropout", type=float, default=0.5, help="share of batches without T5")
    parser.add_argument("--uniform_share", type=float, default=0.3, help="of noise levels; the rest is logit-normal")
    parser.add_argument("--shift", type=float, default=1.0, help="of the noise levels that the pipeline samples at")
    return parser.parse_args(argv)


def learn_t5_vocabulary(captions, size):
    """List of `size` pairs (token, score): <pad>, </s>, <unk>, then Unigram tokens learnt from the captions.

    The order of rare tokens differs each time, since ties are broken at random.
    """
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = T5Tokenizer(extra_ids=0).backend_tokenizer.pre_tokenizer
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=["▁", *map(chr, range(33, 127))],
        show_progress=False,
    )
    unigram.train_from_iterator(captions, trainer)
    return json.loads(unigram.to_str())["model"]["vocab"]


def build_t5_tokenizer(captions, size, file=None):
    """A T5 tokenizer with the vocabulary of `learn_t5_vocabulary`, kept in `file` and read from there if it exists."""
    vocabulary = json.loads(file.read_text()) if file and file.is_file() else learn_t5_vocabulary(captions, size)
    if file:
        file.write_text(json.dumps(vocabulary))
    return T5Tokenizer(vocab=[tuple(pair) for pair in vocabulary], extra_ids=0, model_max_length=256)


def build_pipeline(args, captions):
    """An untrained `StableDiffusion3Pipeline` around the trained autoencoder."""
    torch.manual_seed(args.seed)
    tokenizer, tokenizer_2 = build_tokenizers(captions, args.vocabulary)
    kept = Path(args.output_dir) / "t5_vocabulary.json"  # a saved state needs the same vocabulary
    tokenizer_3 = build_t5_tokenizer(captions, args.t5_vocabulary, kept)
    width = 64 * args.layers  # other programs derive the number of layers from the width
    text_encoders = [
        CLIPTextModelWithProjection(config)
        for config in clip_configs((tokenizer, tokenizer_2), args.text_width, args.text_layers)
    ]
    t5_config = T5Config(
        vocab_size=len(tokenizer_3),
        d_model=args.t5_width,
        d_kv=32,
        num_heads=3,
        d_ff=args.t5_width,
        num_layers=args.t5_layers,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=16,  # from here on all pads are equally far
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer_3.pad_token_id,
        eos_token_id=tokenizer_3.eos_token_id,
        tie_word_embeddings=False,
        use_cache=False,
        is_encoder_decoder=False,
    )
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=args.layers,
        attention_head_dim=64,
        num_attention_heads=args.layers,
        joint_attention_dim=args.t5_width,
        caption_projection_dim=width,
        pooled_projection_dim=2 * args.text_width,
        pos_embed_max_size=SIZE // 8,  # pictures up to twice as large
        qk_norm="rms_norm",
    )
    with torch.no_grad():
        for text_encoder in text_encoders:  # with CLIP's 0.02 the penultimate states would be too small
            text_encoder.get_input_embeddings().weight.mul_(25)
        for name, parameter in transformer.named_parameters():  # as in DiT, each block starts as the identity
            if ("norm1" in name and "linear" in name) or name.startswith(("norm_out.linear", "proj_out")):
                parameter.zero_()
    return StableDiffusion3Pipeline(
        vae=AutoencoderKL.from_pretrained(args.vae).eval().requires_grad_(False),
        text_encoder=text_encoders[0],
        text_encoder_2=text_encoders[1],
        text_encoder_3=T5EncoderModel(t5_config),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=tokenizer_3,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_STEPS, shift=args.shift),
    )


class JointAttention:
    """SD3's joint attention in plain operations. key_bias (image tokens + text tokens,) is added to the scores."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, key_bias=None):
        length = hidden_states.shape[1]

        def heads(projected, norm=None):
            projected = projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return projected if norm is None else norm(projected)

        x, c = hidden_states, encoder_hidden_states
        query = torch.cat([heads(attn.to_q(x), attn.norm_q), heads(attn.add_q_proj(c), attn.norm_added_q)], dim=2)
        key = torch.cat([heads(attn.to_k(x), attn.norm_k), heads(attn.add_k_proj(c), attn.norm_added_k)], dim=2)
        value = torch.cat([heads(attn.to_v(x)), heads(attn.add_v_proj(c))], dim=2)
        if attn.context_pre_only:  # the last block has no output for text tokens
            query = query[:, :, :length]
        scores = (query * attn.scale) @ key.transpose(-1, -2)
        if key_bias is not None:
            scores = scores + key_bias
        mixed = (scores.softmax(dim=-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
        x = attn.to_out[0](mixed[:, :length])
        return x, None if attn.context_pre_only else attn.to_add_out(mixed[:, length:])


def stand_in_bias(length, first, stand_ins):
    """Bias of the attention scores of keys, of which the last `stand_ins` stand for all keys from `first` to `length`.

    Returns (first + stand_ins,): zeros, then log(number of keys that each stand-in stands for).
    """
    return torch.cat([torch.zeros(first), torch.full((stand_ins,), (length - first) / stand_ins).log()])


def encode_text(pipeline, batch):
    """Output of the three text encoders, in the pipeline's order, with stand-ins for pads.

    Returns the states, (B, K + 4 + K + 4, W), the pooled projections, (B, 2 text widths), and the bias of each state
    as a key, (K + 4 + K + 4,). Without T5 a single state replaces the last K + 4.
    """
    positions, first = batch["positions"].unsqueeze(0), batch["ids"].shape[-1] - STAND_INS
    clip_bias = stand_in_bias(CLIP_TOKENS, first, STAND_INS)
    causal = clip_bias + torch.full((len(clip_bias),) * 2, -torch.inf).triu(1)
    states, pooled = [], []
    for text_encoder, ids in zip((pipeline.text_encoder, pipeline.text_encoder_2), batch["ids"], strict=True):
        mask = causal.expand(len(ids), 1, -1, -1)  # with 4 dimensions it is added to the scores unchanged
        encoded = text_encoder(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
        states.append(encoded.hidden_states[-2])
        pooled.append(encoded.text_embeds)
    clip = torch.cat(states, dim=-1)
    clip = torch.nn.functional.pad(clip, (0, pipeline.transformer.config.joint_attention_dim - clip.shape[-1]))

    if batch["t5_ids"] is None:  # the pipeline has zeros, all alike: one is enough
        t5_bias, t5 = stand_in_bias(batch["t5_length"], 0, 1), clip.new_zeros(len(clip), 1, clip.shape[-1])
    else:
        t5_bias = stand_in_bias(batch["t5_length"], batch["t5_ids"].shape[1] - STAND_INS, STAND_INS)
        mask = t5_bias.expand(len(clip), 1, len(t5_bias), -1)
        t5 = pipeline.text_encoder_3(batch["t5_ids"], attention_mask=mask).last_hidden_state
    return torch.cat([clip, t5], dim=1), torch.cat(pooled, dim=-1), torch.cat([clip_bias, t5_bias])


def train_loss(pipeline, batch):
    """Mean squared error of the predicted velocity; a scalar.

    batch: latents and noise (B, 16, 8, 8); sigmas (B,); for `encode_text` CLIP's ids (2, B, K + 4) and their positions
        (K + 4,), t5_ids (B, K + 4) or None without T5, and t5_length, the number of T5 tokens with all pads.
    """
    sigmas = batch["sigmas"].view(-1, 1, 1, 1)
    noisy = (1 - sigmas) * batch["latents"] + sigmas * batch["noise"]
    with autocast():
        states, pooled, bias = encode_text(pipeline, batch)
        bias = torch.cat([torch.zeros(noisy[0, 0].numel() // 4), bias])
        predicted = pipeline.transformer(
            noisy, states, pooled, TRAIN_STEPS * batch["sigmas"], joint_attention_kwargs={"key_bias": bias}
        ).sample
    return (predicted.float() - (batch["noise"] - batch["latents"])).pow(2).mean()


def draw_sigmas(rng, size, uniform_share):
    """Noise levels (size,): logit-normal(0, 1) as in the SD3 paper; a share of them uniform in (0, 1)."""
    logit_normal = 1 / (1 + np.exp(-rng.standard_normal(size)))
    uniform = rng.random(size)
    return torch.from_numpy(np.where(rng.random(size) < uniform_share, uniform, logit_normal)).float()


def draw_batch(rng, tokens, posteriors, probabilities, args):
    """A random batch for `train_loss`. The last caption in `tokens` is "", the unconditional caption."""
    ids, lengths, t5_ids, t5_lengths = tokens
    means, stds, _ = posteriors
    size = args.batch_size
    rows = rng.choice(len(probabilities), size=size, p=probabilities)
    captions = np.where(rng.random(size) < args.caption_dropout, len(probabilities), rows)
    first = int(lengths[captions].max())
    pads = np.sort(rng.choice(np.arange(first, CLIP_TOKENS), size=STAND_INS, replace=False))
    positions = torch.from_numpy(np.concatenate([np.arange(first), pads]))
    t5_tokens = int(t5_lengths[captions].max()) + STAND_INS
    spread, noise = torch.from_numpy(rng.standard_normal((2, size, *means.shape[2:]), dtype=np.float32))
    return {
        "ids": ids[:, captions][:, :, positions],
        "positions": positions,
        "t5_ids": t5_ids[captions, :t5_tokens] if rng.random() >= args.t5_dropout else None,
        "t5_length": int(rng.choice(T5_TOKENS)),
        "latents": means[rows, 0] + stds[rows, 0] * spread,
        "noise": noise,
        "sigmas": draw_sigmas(rng, size, args.uniform_share),
    }


def tokenize_all(pipeline, captions):
    """Ids and lengths of all captions and of "": CLIP's (2, N + 1, 77) and (N + 1,), T5's (N + 1, 77) and (N + 1,)."""
    captions = [*captions, ""]
    t5_ids = pipeline.tokenizer_3(captions, padding="max_length", max_length=CLIP_TOKENS, return_tensors="pt")
    lengths = [
        torch.tensor([len(ids) for ids in tokenizer(captions).input_ids])
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_3)
    ]
    return tokenize(pipeline, captions), lengths[0], t5_ids.input_ids, lengths[1]


def main(argv=None):
    """Train, then save the pipeline."""
    args = parse_args(argv)
    started = time.time()
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    _, captions = load_training_pictures(args, SIZE)
    _, all_captions = load_training_pictures(args, SIZE, "all")
    pipeline = build_pipeline(args, all_captions)  # so tokens are the same for each domain
    posteriors = encode_pictures(pipeline.vae.to(memory_format=torch.channels_last), args)
    tokens, probabilities = tokenize_all(pipeline, captions), sampling_probabilities(captions)
    # on a CPU, PyTorch's fused attention has a slow backward pass for short sequences
    pipeline.transformer.set_attn_processor(JointAttention())
    for text_encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        text_encoder.set_attn_implementation("eager")
    print(f"latents: mean {posteriors[0].mean():.3f}, standard deviation {posteriors[0].std():.3f}")

    def step_loss(rng):
        return train_loss(pipeline, draw_batch(rng, tokens, posteriors, probabilities, args))

    train(pipeline, ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"), args, started, step_loss)
    finish(pipeline, args, output_dir / "pipeline")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()

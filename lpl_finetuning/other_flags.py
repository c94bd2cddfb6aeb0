"""Flags of other training programs that people bring along, and what to do here instead.

The programs are diffusers' training scripts, sd-scripts (kohya), OneTrainer, transformers' Trainer and accelerate.
Nothing here is imported: `advice_on` knows the flags of the script that asks, and names no flag that it lacks.
"""

import re

_ACCELERATE = "it is a flag of accelerate launch, which takes it before the script's name"
_NO_PRIOR = "prior preservation is not in these scripts; leave it out"
_LATENTS = ("leave it out: latents are encoded once and kept where the crops are fixed; random crops are encoded in "
            "every step, and --center_crop or --cache_variants fixes them")  # fmt: skip
_PROMPTS = ("leave it out: prompts are encoded once and kept; where --train_text_encoder trains their encoders, only "
            "what stays fixed is kept")  # fmt: skip
_AT_ONCE = "leave it out: how many images are encoded at a time follows from the resolution or the batch"
_PRODIGY = "leave it out: it is on with --optimizer prodigy"
_FLOW_ONLY = "it is of train_sd3_lpl_flow.py; leave it out"
_NOISE_ONLY = "it is of train_sdxl_lpl.py; rectified flow has --weighting_scheme instead"
_PICTURE = "use --validation_prompts_file, whose entries have a guidance and a negative prompt"
_BUCKETS = "leave it out: --aspect_ratio_buckets auto has shapes of constant area, in steps of 64 px"
_ALL_TIMES = ("timesteps are drawn from all; --timestep_bias_strategy range draws some more often",
              "timesteps are drawn from all; --weighting_scheme chooses the density")  # fmt: skip
_NO_NOISE = "other noise than --noise_offset is not in these scripts; leave it out"
_SQUARED = "the diffusion loss is the squared error; leave it out"
_SMALLER = ("what saves memory here is --gradient_checkpointing, --offload_ema, --optimizer adafactor and "
            "--bnb_quantization_config_path")  # fmt: skip
_STEPS = "use --checkpointing_steps, in optimizer steps"
_PLOT = "use --validation_steps, in optimizer steps"
_NAMES = "the trackers' project has a fixed name, and they name the run; leave it out"
_OWN_PRECISION = "use --save_dtype"
_HALF = "leave it out: what is trained has float32 weights under every --mixed_precision"
_LOADER = "use --dataloader_num_workers"

# {flag: advice, or several of which the first counts that names only flags that the script has}
_ADVICE: dict[str, str | tuple[str, ...]] = dict.fromkeys(
    ("num_processes", "num_machines", "multi_gpu", "gpu_ids", "main_process_port", "use_deepspeed", "use_fsdp",
     "num_cpu_threads_per_process", "dynamo_backend", "machine_rank", "zero_stage", "offload_optimizer_device",
     "offload_param_device", "zero3_init_flag", "zero3_save_16bit_model"), _ACCELERATE,
) | dict.fromkeys(
    ("with_prior_preservation", "prior_preservation", "prior_loss_weight", "class_data_dir", "class_prompt",
     "num_class_images", "prior_generation_precision", "sample_batch_size", "reg_data_dir"), _NO_PRIOR,
) | dict.fromkeys(
    ("cache_latents", "cache_latents_to_disk", "precompute_latents"), _LATENTS,
) | dict.fromkeys(
    ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "pre_compute_text_embeddings"), _PROMPTS,
) | dict.fromkeys(
    ("vae_encode_batch_size", "vae_batch_size", "text_encoder_batch_size", "sd3_text_encoder_batch_size"), _AT_ONCE,
) | dict.fromkeys(
    ("prodigy_safeguard_warmup", "prodigy_use_bias_correction", "prodigy_decouple"), _PRODIGY,
) | dict.fromkeys(
    ("logit_mean", "logit_std", "mode_scale", "precondition_outputs", "timestep_shift"), _FLOW_ONLY,
) | dict.fromkeys(
    ("timestep_bias_strategy", "timestep_bias_multiplier", "timestep_bias_begin", "timestep_bias_end",
     "timestep_bias_portion", "snr_gamma"), _NOISE_ONLY,
) | dict.fromkeys(("guidance_scale", "negative_prompt"), _PICTURE) | dict.fromkeys(
    ("min_timestep", "max_timestep"), _ALL_TIMES,
) | dict.fromkeys(
    ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"), _BUCKETS,
) | dict.fromkeys(
    ("multires_noise_iterations", "multires_noise_discount", "ip_noise_gamma", "adaptive_noise_scale",
     "input_perturbation"), _NO_NOISE,
) | dict.fromkeys(
    ("huber_schedule", "huber_c", "huber_scale", "debiased_estimation_loss", "scale_v_pred_loss_like_noise_pred",
     "v_pred_like_loss"), _SQUARED,
) | dict.fromkeys(
    ("fused_backward_pass", "fp8_base", "blocks_to_swap", "mem_eff_attn", "lowram", "highvram"), _SMALLER,
) | dict.fromkeys(
    ("save_every_n_epochs", "save_every_n_steps", "save_steps", "save_every", "save_interval", "checkpoint_every"),
    _STEPS,
) | dict.fromkeys(
    ("sample_every_n_steps", "sample_every_n_epochs", "sample_every", "eval_steps", "eval_every", "eval_interval",
     "val_every", "validation_every", "validate_every_n_steps", "validate_every_n_epochs"), _PLOT,
) | dict.fromkeys(
    ("wandb_run_name", "tracker_project_name", "run_name", "project_name", "wandb_project", "wandb_entity",
     "log_tracker_name", "log_prefix"), _NAMES,
) | dict.fromkeys(("save_precision", "upcast_before_saving"), _OWN_PRECISION) | dict.fromkeys(
    ("full_fp16", "full_bf16"), _HALF
) | dict.fromkeys(
    ("max_data_loader_n_workers", "num_workers", "workers", "dataloader_workers"), _LOADER,
) | {
    # the LoRA
    "network_dim": "use --rank", "lora_rank": "use --rank", "lora_r": "use --rank", "lora": "use --use_lora",
    "network_alpha": "use --lora_alpha", "network_dropout": "use --lora_dropout", "network_module": "use --use_lora",
    "network_weights": "use --init_lora", "lora_target_modules": "use --lora_layers",
    "target_modules": "use --lora_layers", "network_train_unet_only": "leave it out: text encoders are trained with "
    "--train_text_encoder only", "network_train_text_encoder_only": "the denoiser is always trained; leave it out",
    "use_blora": "use --lora_blocks style,content",
    "network_args": "use --lora_type, --lora_layers, --lora_pattern",
    "conv_dim": "name other layers in --lora_layers",
    "network_reg_dims": "use --lora_pattern", "dim_from_weights": "leave it out: --init_lora has the file's ranks",
    "base_weights": "add such a LoRA to the base model first, with python -m lpl_finetuning.merge",
    "scale_weight_norms": "norms are not limited here; leave it out", "dora_wd": "use --lora_type dora",
    "lora_bias": "a LoRA has no biases here; leave it out",
    "train_text_encoder_ti": "textual inversion is not in these scripts; leave it out",
    "train_text_encoder_frac": "--train_text_encoder trains them in all steps; leave it out",
    "stop_text_encoder_training": "--train_text_encoder trains them in all steps; leave it out",
    # how long and how fast
    "max_train_epochs": "use --num_train_epochs", "num_epochs": "use --num_train_epochs",
    "epochs": "use --num_train_epochs", "max_epochs": "use --num_train_epochs", "repeats": "use --num_train_epochs",
    "dataset_repeats": "use --num_train_epochs", "max_steps": "use --max_train_steps",
    "num_train_steps": "use --max_train_steps", "batch_size": "use --train_batch_size",
    "per_device_train_batch_size": "use --train_batch_size",
    "accumulate_grad_batches": "use --gradient_accumulation_steps",
    "lr": "use --learning_rate", "unet_lr": "use --learning_rate", "learning_rate_te": "use --text_encoder_lr",
    "learning_rate_te1": "use --text_encoder_lr, one rate for all text encoders",
    "learning_rate_te2": "use --text_encoder_lr, one rate for all text encoders",
    "text_encoder_lr1": "use --text_encoder_lr, one rate for all text encoders",
    "text_encoder_lr2": "use --text_encoder_lr, one rate for all text encoders",
    "block_lr": "all layers have one --learning_rate; leave it out",
    "lr_scheduler_type": "use --lr_scheduler", "lr_scheduler_num_cycles": "use --lr_num_cycles",
    "lr_scheduler_power": "use --lr_power", "warmup_steps": "use --lr_warmup_steps",
    "num_warmup_steps": "use --lr_warmup_steps",
    "lr_decay_steps": "a rate that falls does so over all steps; leave it out",
    "warmup_ratio": "use --lr_warmup_steps, in optimizer steps",
    "optimizer_type": "use --optimizer", "optimizer_name": "use --optimizer",
    "use_prodigy": "use --optimizer prodigy", "use_lion_optimizer": "Lion is not among those of --optimizer",
    "optimizer_args": "the optimizer's numbers are flags, such as --adam_weight_decay",
    "weight_decay": "use --adam_weight_decay", "clip_grad_norm": "use --max_grad_norm",
    "adam_weight_decay_text_encoder": "use --adam_weight_decay, one for all weights",
    "prodigy_beta3": "leave it out: Prodigy takes the root of --adam_beta2",
    "fp16": "use --mixed_precision fp16", "bf16": "use --mixed_precision bf16",
    "precision": "use --mixed_precision", "dtype": "use --mixed_precision", "train_dtype": "use --mixed_precision",
    "xformers": "use --enable_xformers_memory_efficient_attention",
    "enable_xformers": "use --enable_xformers_memory_efficient_attention",
    "sdpa": "leave it out: PyTorch's attention is what is used", "compile": "use --torch_compile",
    "no_half_vae": "leave it out: images are encoded in float32; the loss' decoder has --lpl_vae_dtype",
    "offload": "text encoders that are not trained are unloaded once they have encoded; leave it out",
    # noise and loss
    "min_snr_gamma": ("use --snr_gamma", "rectified flow has --weighting_scheme instead"),
    "v_parameterization": ("use --prediction_type v_prediction", "rectified flow has no choice; leave it out"),
    "prediction_type": "rectified flow has no choice; leave it out",
    "weighting_scheme": "it is of train_sd3_lpl_flow.py; SDXL has --snr_gamma and --timestep_bias_strategy",
    "training_shift": "use --timestep_shift", "loss_type": "the diffusion loss is the squared error; LPL has "
    "--lpl_loss_type", "offset_noise": "use --noise_offset", "lpl_threshold": "use --lpl_t_threshold or "
    "--lpl_sigma_threshold",
    "zero_terminal_snr": ("use --rescale_betas_zero_snr", "rectified flow has no choice; leave it out"),
    "rescale_betas_zero_snr": "rectified flow has no choice; leave it out",
    "max_sequence_length": "it is of train_sd3_lpl_flow.py; SDXL's text encoders take 77 tokens",
    "max_token_length": ("use --max_sequence_length, for T5", "SDXL's text encoders take 77 tokens; leave it out"),
    "t5xxl_max_token_length": ("use --max_sequence_length", "SDXL has no T5; leave it out"),
    # models
    "pretrained_unet_model_name_or_path": "use --pretrained_transformer_model_name_or_path",
    "pretrained_transformer_model_name_or_path": "use --pretrained_unet_model_name_or_path",
    "vae": "use --pretrained_vae_model_name_or_path", "vae_path": "use --pretrained_vae_model_name_or_path",
    "pretrained_vae": "use --pretrained_vae_model_name_or_path", "model": "use --pretrained_model_name_or_path",
    "model_name": "use --pretrained_model_name_or_path", "base_model": "use --pretrained_model_name_or_path",
    "model_path": "use --pretrained_model_name_or_path", "text_encoder": "text encoders are the base model's; "
    "--train_text_encoder trains them", "tokenizer_name": "tokenizers are the base model's; leave it out",
    "clip_l": "text encoders are the base model's; leave it out",
    "clip_g": "text encoders are the base model's; leave it out",
    "t5xxl": "text encoders are the base model's; leave it out",
    # data
    "data_dir": "use --train_data_dir", "image_data_dir": "use --train_data_dir", "image_dir": "use --train_data_dir",
    "instance_data_root": "use --train_data_dir", "val_data_dir": "use --validation_data_dir",
    "eval_data_dir": "use --validation_data_dir", "validation_dir": "use --validation_data_dir",
    "dataset_config": "use --dataset_config_name for a configuration of --dataset_name; files of sd-scripts are not "
    "read", "dataset_split": "the split train is used; leave it out", "in_json": "use --train_data_dir, a folder with "
    "metadata.jsonl", "enable_bucket": "use --aspect_ratio_buckets auto",
    "use_aspect_ratio_bucketing": "use --aspect_ratio_buckets auto", "keep_tokens": "use --keep_tags",
    "shuffle_caption": "use --shuffle_tags", "caption_dropout_rate": "use --proportion_empty_prompts",
    "caption_dropout_prob": "use --proportion_empty_prompts", "flip_aug": "use --random_flip", "random_crop": "leave "
    "it out: crops are random without --center_crop", "color_aug": "colours are never changed; leave it out",
    "caption_tag_dropout_rate": "tags are shuffled by --shuffle_tags, not dropped; leave it out",
    "caption_separator": "tags are parted by commas; leave it out",
    "weighted_captions": "captions have no weights: brackets are text; leave it out",
    "clip_skip": "the layer is the one that the base model's pipelines read; leave it out",
    "alpha_mask": "masks are not used here; leave it out",
    "caption_extension": "captions are .txt or .caption files", "caption_extention": "captions are .txt or .caption "
    "files", "caption_prefix": "use --trigger_word, which stands before every caption that lacks it",
    "resize_interpolation": "use --image_interpolation_mode",
    "masked_loss": "masks are not used here; leave it out",
    # saving, logs, the Hub
    "training_comment": "leave it out: the file's metadata has the run's settings",
    "no_metadata": "leave it out: programs read it; --save_tag_frequency says whether it has the captions' tags",
    "persistent_data_loader_workers": "leave it out: those of --dataloader_num_workers live as long as the run",
    "save_dir": "use --output_dir", "resume": "use --resume_from_checkpoint",
    "save_model_as": "leave it out: weights are safetensors", "use_safetensors": "leave it out: weights are "
    "safetensors", "save_state": "leave it out: checkpoints hold the whole state",
    "save_last_n_steps": "use --checkpoints_total_limit, a number of checkpoints",
    "save_last_n_epochs": "use --checkpoints_total_limit, a number of checkpoints",
    "save_total_limit": "use --checkpoints_total_limit",
    "sample_prompts": "use --validation_prompts_file, which reads such a file",
    "sample_sampler": "use --validation_prompts_file, whose entries have a sampler",
    "final_validation_prompt": "use --validation_prompt: pictures are made at the end too",
    "prompt": "use --validation_prompt", "num_images": "use --num_validation_images",
    "validation_images": "use --num_validation_images",
    "max_validation_steps": "use --max_validation_samples, a number of images",
    "validation_seed": "leave it out: validation pictures have the seeds from --seed on",
    "log_with": "use --report_to", "tracker": "use --report_to", "wandb": "use --report_to wandb",
    "use_wandb": "use --report_to wandb", "tensorboard": "use --report_to tensorboard", "push": "use --push_to_hub",
    "huggingface_repo_id": "use --push_to_hub and --hub_model_id", "hub_repo": "use --push_to_hub and --hub_model_id",
    "repo_id": "use --push_to_hub and --hub_model_id", "huggingface_token": "use HF_TOKEN or `hf auth login`",
    "hf_token": "use HF_TOKEN or `hf auth login`",
    "config_file": "a recipe is --config; accelerate's own file goes before the script's name",
}  # fmt: skip


# {(flag, value in small letters): advice, where the script has the flags that it names}
_VALUES = {
    ("optimizer", "adamw8bit"): "AdamW8bit is --use_8bit_adam",
    ("optimizer", "pagedadamw8bit"): "AdamW in 8 bits is --use_8bit_adam",
    ("mixed_precision", "fp32"): "float32 is no",
    ("mixed_precision", "float32"): "float32 is no",
    ("mixed_precision", "float16"): "float16 is fp16",
    ("mixed_precision", "bfloat16"): "bfloat16 is bf16",
}


def advice_on_value(name: str, text: str) -> str | None:
    """What a value of other programs is called here; None where nothing is known.

    Args:
        name: the flag, without dashes in front; text: the value.
    """
    if name == "resolution" and (sides := re.fullmatch(r"\s*(\d+)\s*[,x]\s*(\d+)\s*", text)):
        return f"for a square give {sides[1]}" if sides[1] == sides[2] else "--aspect_ratio_buckets trains on shapes"
    return _VALUES.get((name, text.lower()))


def advice_on(name: str, flags) -> str | None:
    """What to do instead of an unknown flag of a training script; None where nothing better than --help is known.

    Args:
        name: the flag, without dashes in front.
        flags: names of the flags that the script has.
    """
    if "learning_rate" not in flags:  # no training script
        return None
    advice = _ADVICE.get(name.replace("-", "_"), ())
    for text in (advice,) if isinstance(advice, str) else advice:
        if all(flag in flags for flag in re.findall(r"--(\w+)", text)):
            return text
    return None

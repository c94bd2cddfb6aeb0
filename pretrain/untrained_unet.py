"""Save a UNet built like that of a pipeline, with random weights, to train from scratch with `train_sdxl_lpl.py`.

    python pretrain/untrained_unet.py --pipeline examples/tiny-sdxl --output_dir pretrain/work/untrained-unet

`--pretrained_unet_model_name_or_path` takes the folder. Two trainings that are compared begin with the same folder.
"""

import argparse

import torch
from diffusers import UNet2DConditionModel


def main(argv=None):
    """Build the UNet, then save it in float32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="folder or Hub name of a Stable Diffusion XL in diffusers' "
                        "layout; only unet/config.json is read")  # fmt: skip
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    args = parser.parse_args(argv)
    config = UNet2DConditionModel.load_config(args.pipeline, subfolder="unet")
    torch.manual_seed(args.seed)
    unet = UNet2DConditionModel.from_config(config)
    unet.save_pretrained(args.output_dir)
    print(f"saved {args.output_dir}: {unet.num_parameters():,} parameters, none of them trained")


if __name__ == "__main__":
    main()

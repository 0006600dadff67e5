"""Train the embedded model from scratch: `python -m tools.train_emoji STAGE`.

Run the stages in this order: `scenes`, `clip` (which contains the text encoder), `scorer` (the held-out CLIP),
`autoencoder`, `denoiser`, `export`. The same command resumes a stopped stage from its last checkpoint; more `--steps`
train longer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lightning_prompts.emoji import world
from tools.train_emoji.export import export
from tools.train_emoji.training import render_scenes, train


def main() -> None:
    """Parse the command line and run one stage."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_emoji", description=__doc__)
    parser.add_argument("stage", choices=["scenes", "clip", "scorer", "autoencoder", "denoiser", "export"])
    parser.add_argument(
        "--work", type=Path, default=Path("emoji-training"), help="scenes, checkpoints and float32 weights"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(world.__file__).parent, help="folder to export model/ and scorer/ to"
    )
    parser.add_argument("--count", type=int, default=60_000, help="training images, for `scenes`")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="bf16-mixed")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    if args.stage == "scenes":
        render_scenes(args.work, args.count, args.seed)
    elif args.stage == "export":
        export(args.work, args.out)
    else:
        train(args.stage, args.work, args.steps, args.batch_size, args.lr, args.seed, args.precision)


if __name__ == "__main__":
    main()

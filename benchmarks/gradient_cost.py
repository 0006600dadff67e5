"""Measure the cost of the gradient of an image with respect to its prompt: `python benchmarks/gradient_cost.py`.

For 10 to 100 sampling steps, prints the peak memory beyond the loaded models and the time of the shortcut text gradient
(through one call of the denoiser, three fifths along the way) and of the full gradient through all calls, whose
activations are recomputed in the backward pass. Each is measured on the embedded model in processes of its own: the
time with the default allocator, and the memory with one that returns freed memory immediately, which is slow but holds
nothing that is not in use.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

STEPS = (10, 25, 50, 100)
NUM_IMAGES = 4
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc returns larger blocks to the system immediately


def peak_and_now() -> tuple[float, float]:
    """Return the peak and the current memory of this process, in megabytes."""
    status = Path("/proc/self/status").read_text()
    most, now = (int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) / 1024 for name in ("VmHWM", "VmRSS"))
    return most, now


def measured(kind: str, steps: int) -> str:
    """Measure the peak memory in megabytes above what was allocated before, and the seconds."""
    from lightning_prompts.backbones import load_backbone
    from lightning_prompts.backbones.vocabulary import encode_text
    from lightning_prompts.objectives.clip import ClipSimilarity, default_clip
    from lightning_prompts.objectives.spherical import spherical_distance

    backbone = load_backbone("emoji")
    clip = ClipSimilarity(default_clip(backbone))
    prompt = "a small bunny on a crimson background"
    ids = encode_text(backbone.text_encoders[0].tokenizer, [prompt, "blurry"], backbone.text_encoders[0].length)
    noise = torch.randn(NUM_IMAGES, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    wanted = clip.features_of([prompt])
    calls, grad_steps = (3 * steps // 5, 1) if kind == "shortcut" else (steps, steps)

    def gradient(calls: int, grad_steps: int) -> None:
        table = backbone.text_encoders[0].table[ids].clone().requires_grad_()
        prompt_embeds, negative_prompt_embeds = (
            backbone.encode(ids[i : i + 1], table[i : i + 1]).repeat_interleave(NUM_IMAGES) for i in (0, 1)
        )
        latents = backbone.sample(prompt_embeds, negative_prompt_embeds, noise, steps, 3.0, grad_steps, calls)
        loss = spherical_distance(clip.features(backbone.decode(latents)), wanted).mean()
        torch.autograd.grad(loss, table)

    _, before = peak_and_now()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current memory
    begun = time.perf_counter()
    gradient(calls, grad_steps)
    seconds = time.perf_counter() - begun
    most, _ = peak_and_now()
    return f"{most - before:.0f} {seconds:.2f}"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs=2, metavar=("KIND", "STEPS"), help="measure one line in this process")
    args = parser.parse_args()
    if args.only:
        print(measured(args.only[0], int(args.only[1])))
        return
    print(f"{NUM_IMAGES} images, {platform.machine()}, {torch.get_num_threads()} threads, float32\n")
    print("| sampling steps | shortcut, MB | full, MB | shortcut, s | full, s |\n|---|---|---|---|---|")
    for steps in STEPS:
        cells = []
        for kind in ("shortcut", "full"):
            program = [sys.executable, __file__, "--only", kind, str(steps)]
            outputs = [
                subprocess.run(
                    program, capture_output=True, text=True, check=True, env=os.environ | more
                ).stdout.split()
                for more in (RETURN_MEMORY, {})
            ]
            cells.append((outputs[0][0], outputs[1][1]))
        (memory, seconds), (other_memory, other_seconds) = cells
        print(f"| {steps} | {memory} | {other_memory} | {seconds} | {other_seconds} |", flush=True)


if __name__ == "__main__":
    main()

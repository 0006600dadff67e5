"""The help texts of the commands."""

from __future__ import annotations

DESCRIPTIONS = {
    "fit": "Search prompts for images or better prompts for prompts, and write the results to the run's folder.",
    "validate": "Score the prompts of a run again, by the loss that the search selects by.",
    "test": "Generate images from the prompts of a run again, score them, and write the results anew.",
    "predict": "Generate images from the prompts of a run or from others, or recombine the prompts of two runs.",
    "show-space": "List the words that DPODiff would choose from, without a search.",
    "check": "Take one step and measure whether a search can work on a model, which settings suit it, and its cost.",
    "dry-run": "Take one step and report the memory and time of a search, and the settings that lower the memory.",
    "prefetch": "Download the files of models that a run reads, for later use or for use offline.",
}
"""What each command does, in one sentence."""

COMMANDS = tuple(DESCRIPTIONS)

OVERVIEW = """usage: train.py COMMAND [--config FILE] [--run FOLDER] [settings]

Search the prompt space of frozen text-to-image diffusion models.

commands:
  fit         search prompts
  validate    score the prompts of a run again
  test        generate images from the prompts of a run again and score them
  predict     generate more images, interpolate between prompts, or mix two runs
  show-space  list the words that DPODiff would choose from
  check       measure whether a search can work on a model, and suggest settings
  dry-run     report the memory and time that a search would take
  prefetch    download models for later use

examples:
  train.py fit --config configs/invert.yaml --data.images photo.png
  train.py fit --config configs/dpo_diff.yaml --data.prompts "a dog"
  train.py test --run runs/NAME
  train.py predict --run runs/NAME --seeds 0,1,2,3
  train.py predict --mix runs/NAME runs/OTHER
  train.py show-space --config configs/dpo_diff.yaml --data.prompts "a dog"
  train.py check --config configs/invert.yaml --data.images photos --write mine.yaml
  train.py prefetch sdxl

settings:
  train.py COMMAND --help                     of a command
  train.py fit --model.help PH2P              of a method
  train.py fit --data.help ImagesToPrompts    of images as inputs
  train.py fit --data.help Prompts            of prompts as inputs
"""
"""What `train.py --help` prints."""

GROUP_TITLES = {
    "trainer": "Settings of Lightning's Trainer",
    "model": "The method and its settings",
    "data": "The inputs and their settings",
    "fit": "Resuming",
}
"""Titles in the help text, by group of settings; Lightning's own are sentences of docstrings."""

SETTING_HELP = {
    "ckpt_path": "Checkpoint to resume the search from: last for the newest one of the run, or a file.",
    "model": "Class of the method, such as PH2P. Its settings follow as --model.NAME.",
    "data": "Class of the inputs; by default ImagesToPrompts or Prompts, by the given --data.NAME.",
    "trainer.devices": "Number of processes or GPUs on each machine, a list of GPUs, or auto.",
    "trainer.num_nodes": "Number of machines, on which torchrun or srun has started the command.",
    "trainer.strategy": "How processes divide the work of fit: problems (each process searches its own problems), "
    "samples (all search the same problems and divide the samples), or auto.",
    "trainer.precision": "Precision of the computation: 32-true or bf16-mixed. --model.backbone.dtype sets that of the "
    "frozen weights.",
    "trainer.max_time": "Stop the search after this time, as days:hours:minutes:seconds.",
}
"""Help texts of Lightning's settings, in this package's words."""

_RUN = {
    "fit": "--run names the run's folder, by default runs/TIME_METHOD; --ckpt_path last resumes the search there.",
    "predict": "--run names the run's folder. With --mix it is a new one, by default runs/TIME_mix.",
}
_FINISHED = "--run names the run's folder. Its saved settings are the defaults."


def usage(command: str) -> str:
    """Return the usage line of a command: the parser's own would list all settings."""
    run = "" if command in ("show-space", "check", "dry-run") else " --run FOLDER"
    run = f" [{run.strip()}]" if command in ("fit", "predict") else run
    return f"train.py {command} [--config FILE]{run} [settings]"


def describe(command: str) -> str:
    """Return the description in the help text of a command."""
    run = _RUN.get(command, _FINISHED if command in ("validate", "test") else "It takes the settings of fit.")
    return f"{DESCRIPTIONS[command]} {run}"

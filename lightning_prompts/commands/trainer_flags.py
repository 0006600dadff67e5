"""Check Lightning's flags, many of which have no meaning for a search over prompts."""

from __future__ import annotations

import inspect
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException

from lightning_prompts.errors import UserError
from lightning_prompts.runner import TRAINER_DEFAULTS

HALF_PRECISIONS = (
    "16",
    "16-true",
    "16-mixed",
    "bf16-true",
    "transformer-engine",
    "transformer-engine-float16",
)

_LENGTH = "set the length of a search with --effort, --model.steps or --model.budget"
_PATIENCE = "set when a search may stop early with --model.patience"
_VALIDATION = "a search has no validation loop; set how often prompts are scored with --model.score_every_n_steps"
_CLIPPING = "methods limit their steps themselves, as PH2P with --model.optimizer.max_step_norm"

UNSUPPORTED_FLAGS = {
    "max_steps": _LENGTH,
    "min_steps": _PATIENCE,
    "max_epochs": _LENGTH,
    "min_epochs": _PATIENCE,
    "fast_dev_run": "try one step with train.py dry-run",
    "overfit_batches": "choose the inputs with --data.images or --data.prompts",
    "limit_train_batches": _LENGTH,
    "limit_val_batches": _VALIDATION,
    "val_check_interval": _VALIDATION,
    "check_val_every_n_epoch": _VALIDATION,
    "gradient_clip_val": _CLIPPING,
    "gradient_clip_algorithm": _CLIPPING,
    "accumulate_grad_batches": "set samples per step with --data.num_noise_samples, per call with --model.microbatch",
    "reload_dataloaders_every_n_epochs": "a search has one epoch",
    "limit_test_batches": "test scores every prompt of the run",
    "limit_predict_batches": "predict generates images from every prompt of the run",
    "num_sanity_val_steps": _VALIDATION,
    "use_distributed_sampler": "set how processes divide the work with --trainer.strategy",
    "log_every_n_steps": "every better prompt is logged; --model.log_images_every_n_steps sets how often images are",
    "enable_checkpointing": "a search always keeps its two newest checkpoints",
    "enable_model_summary": "only the prompt is optimized",
    "enable_autolog_hparams": "the run's config.yaml has its settings",
    "model_registry": "prompts and embeddings are saved in the run's folder",
    "default_root_dir": "set the run's folder with --run",
    "plugins": "a search uses its own",
    "sync_batchnorm": "the models are frozen",
}
"""Flags of Lightning's Trainer that a search does not support, with the reason or the setting to use instead."""

HIDDEN_FLAGS = frozenset(
    {
        *(f"trainer.{name}" for name in UNSUPPORTED_FLAGS),
        "seed_everything",
        "return_predictions",
        "verbose",
        "weights_only",
    }
)
"""Flags that the help text leaves out, since a search does not support them or sets them itself."""


def check_precision(precision: object) -> None:
    """Refuse half precision, which would round the prompts or their gradients.

    Raises:
        UserError: The precision is a half precision.
    """
    if str(precision) in HALF_PRECISIONS:
        raise UserError(
            f"--trainer.precision {precision} would round the prompts or their gradients to half precision, which "
            "ruins their optimization; use 32-true or bf16-mixed, and --model.backbone.dtype for the frozen weights."
        )


def check_flags(config: Any) -> None:
    """Refuse flags that would have no effect or end a search before it starts, and name the setting to use instead.

    Args:
        config: All settings of a command.

    Raises:
        UserError: An unsupported flag has another value than its default.
    """
    if config.seed_everything is not False:
        raise UserError(
            "--seed_everything has no effect on a search, whose random draws depend on --data.seed alone; give that "
            "instead."
        )
    parameters = inspect.signature(pl.Trainer).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()} | TRAINER_DEFAULTS
    for name, reason in UNSUPPORTED_FLAGS.items():
        if name in config.trainer and config.trainer[name] != defaults[name]:
            raise UserError(f"--trainer.{name} does not fit a search ({reason}); leave it out.")
    if config.trainer.max_time is not None:
        check_max_time(config.trainer.max_time)


def check_max_time(max_time: Any) -> None:
    """Refuse a --trainer.max_time that is no duration, or that ends a search before its first step.

    Raises:
        UserError: It is not a positive duration.
    """
    try:
        seconds = pl.callbacks.Timer(max_time).time_remaining()
    except (MisconfigurationException, TypeError, ValueError):
        seconds = None
    if seconds is None or seconds <= 0:
        raise UserError(
            f"--trainer.max_time cannot be {str(max_time)!r}; it takes a duration as days:hours:minutes:seconds, such "
            "as 00:01:30:00."
        )

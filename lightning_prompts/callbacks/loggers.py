"""Log text and images to the loggers that support them; metrics reach all loggers through Lightning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torchvision.transforms.functional import pil_to_tensor

from lightning_prompts.errors import escaped_markdown


def log_text(loggers: Sequence[Logger], name: str, lines: Sequence[str], step: int = 0) -> None:
    """Log lines of text, such as prompts.

    TensorBoard shows them as paragraphs, Weights & Biases as a table, and MLflow as a text file per step. Loggers
    without text, such as `CSVLogger`, are skipped.

    Args:
        loggers: The trainer's loggers.
        name: Name in the loggers.
        lines: The lines; markup of HTML or Markdown in them is escaped.
        step: Step of the search.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, "\n\n".join(map(escaped_markdown, lines)), step)
        elif isinstance(logger, WandbLogger):
            logger.log_text(name, columns=[name], data=[[line] for line in lines], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(logger.run_id, "\n".join(lines) + "\n", f"{name}/{step:08d}.txt")


def supports_images(loggers: Sequence[Logger]) -> bool:
    """Return whether any of the loggers supports images."""
    return any(isinstance(logger, TensorBoardLogger | WandbLogger | MLFlowLogger) for logger in loggers)


def log_images(loggers: Sequence[Logger], name: str, images: Sequence[Image.Image], step: int = 0) -> None:
    """Log images of equal size to TensorBoard, Weights & Biases and MLflow.

    Args:
        loggers: The trainer's loggers.
        name: Name in the loggers.
        images: The images.
        step: Step of the search.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_images(name, torch.stack([pil_to_tensor(image) for image in images]), step)
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, list(images), step=step)
        elif isinstance(logger, MLFlowLogger):
            for number, image in enumerate(images):
                logger.experiment.log_image(logger.run_id, image, f"{name}/{step:08d}-{number}.png")

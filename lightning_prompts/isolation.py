"""Run a search inside another program, whose state stays as it is."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pytorch_lightning.utilities.seed import isolate_rng


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Ignore the program's gradient modes and autocast; restore its random state, loggers, warnings and handlers.

    Args:
        device: Device of the search.

    Raises:
        KeyboardInterrupt: After Ctrl-C, of which Lightning makes a SystemExit.
    """
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    loggers += [logging.getLogger(f"{logger.name}.utilities.rank_zero") for logger in loggers]
    levels = [logger.level for logger in loggers]
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        modes = torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False)
        with isolate_rng(), modes[0], modes[1], modes[2], warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", module=r"pytorch_lightning|lightning_fabric|torch|diffusers|transformers|PIL"
            )
            yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)  # which Lightning replaces after Ctrl-C

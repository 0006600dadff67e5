"""The command line: Lightning's, with one-sentence errors, run folders and exit codes 0, 2, 130 and 143.

0 is success, 2 a person's mistake, 130 Ctrl-C and 143 SIGTERM.
"""

from __future__ import annotations

import difflib
import logging
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from lightning_prompts.errors import UserError

COMMANDS = ("fit", "validate", "test", "predict")
HELP = """usage: train.py COMMAND [--config FILE] [--run FOLDER] [settings]

  fit       search prompts:         train.py fit --config configs/ph2p.yaml --data.images photo.png
  validate  score found prompts:    train.py validate --run runs/NAME
  test      draw from the prompts:  train.py test --run runs/NAME
  predict   draw more pictures:     train.py predict --run runs/NAME --seeds 0,1,2,3

All settings of a command: train.py COMMAND --help; of a method: train.py fit --model.help PH2P
"""


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command and exits.

    Args:
        args: Command line; by default the process's.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(HELP)  # without importing Lightning, which takes seconds
        return
    _manners()
    try:
        _check_order(args)
        run, args = _with_run_config(args)
        _run(args, run)
    except UserError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        _refuse(f"{error.filename or 'A file'} cannot be used: {error.strerror or error}.")


def _refuse(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _manners() -> None:
    warnings.filterwarnings(
        "ignore", module=r"pytorch_lightning|lightning_fabric|torch|diffusers|transformers|jsonargparse"
    )
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("lightning_prompts").setLevel(logging.INFO)


def _check_order(args: list[str]) -> None:
    if args[0] in COMMANDS:
        return
    if any(command in args for command in COMMANDS):
        raise UserError(
            f"The command comes first and its settings after it, not {args[0]!r}: train.py fit --config FILE ..."
        )
    close = difflib.get_close_matches(args[0], COMMANDS, 1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    raise UserError(f"The command {args[0]!r} is unknown{hint}; use one of {', '.join(COMMANDS)}.")


def _with_run_config(args: list[str]) -> tuple[Path | None, list[str]]:
    """Takes --run out; for the commands that look at a finished run, puts its saved settings first."""
    run = None
    for i, arg in enumerate(args):
        if arg == "--run" or arg.startswith("--run="):
            taken = 1 if "=" in arg else 2
            if taken == 2 and i + 1 == len(args):
                raise UserError("--run needs the run's folder, for example --run runs/mine.")
            run = Path(arg.split("=", 1)[1] if taken == 1 else args[i + 1])
            args = args[:i] + args[i + taken :]
            break
    if args[0] == "fit" or "--help" in args or "-h" in args:
        return run, args
    if run is None:
        raise UserError(f"The command {args[0]!r} needs the run to look at: train.py {args[0]} --run runs/NAME.")
    if not (run / "config.yaml").exists():
        raise UserError(f"There is no run in {run} (it has no config.yaml); give the folder of an earlier fit.")
    return run, [args[0], "--config", str(run / "config.yaml"), *args[1:]]


def _run(args: list[str], run: Path | None) -> None:
    import pytorch_lightning as pl
    import torch
    from jsonargparse import set_parsing_settings
    from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
    from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

    import lightning_prompts.methods
    from lightning_prompts.callbacks import AtomicCheckpointIO, PromptCheckpoint, Results, last_checkpoint
    from lightning_prompts.data.inversion import ImagesToPrompts
    from lightning_prompts.problems import RunFolder, atomic_write

    allowed = ["lightning_prompts", "pytorch_lightning.callbacks", "pytorch_lightning.loggers",
               "pytorch_lightning.profilers", "pytorch_lightning.strategies", "torch.optim"]  # fmt: skip
    del allowed
    set_parsing_settings(validate_defaults=False)

    class Parser(LightningArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UserError(_one_sentence(message, self))

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument(
                "--seeds", type=str, default="0", help="seeds that `predict` draws from, such as 0,1,2,3"
            )
            parser.add_argument("--scorer", type=str | None, default=None, help="folder or hub id of the held-out CLIP")

        def before_instantiate_classes(self) -> None:
            command = self.config.subcommand
            config = self.config[command]
            name = config.model.class_path.rsplit(".", 1)[-1]
            if config.trainer.precision in ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16"):
                raise UserError(
                    f"The precision {config.trainer.precision} would make the prompts half precision, which ruins their "
                    "optimisation; use 32-true or bf16-mixed, and --model.dtype for the frozen weights."
                )
            folder = RunFolder(run or Path("runs") / RunFolder.name(name, datetime.now()))
            if command == "fit":
                folder.prepare(resume=bool(config.get("ckpt_path")))
                dumped = self._parser(command).dump(config.clone(), skip_none=False)
                atomic_write(folder.config, re.sub(r"(?m)^ckpt_path:.*$", "ckpt_path: null", dumped).encode())
            if config.get("ckpt_path") == "last":
                found = last_checkpoint(folder.checkpoints)
                config.ckpt_path = str(found) if found else None
            if command != "fit":
                config.ckpt_path = None
            config.trainer.default_root_dir = str(folder.path)
            self.folder, self.command = folder, command

        def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
            config = self.config[self.command]
            try:
                seeds = [int(seed) for seed in config.seeds.split(",")]
            except ValueError:
                raise UserError(f"--seeds takes whole numbers such as 0,1,2,3, not {config.seeds!r}.") from None
            settings = {"model": config.model.init_args.as_dict(), "data": config.data.init_args.as_dict()}
            results = Results(config.scorer, seeds, settings)
            logger = (
                pl.loggers.TensorBoardLogger(self.folder.path, name="", version="") if self.command == "fit" else False
            )
            self.trainer_defaults = {
                "logger": logger,
                "callbacks": [PromptCheckpoint(self.folder.checkpoints), results],
                "plugins": [AtomicCheckpointIO()],
            }
            for key in ("logger", "callbacks", "plugins"):
                config.trainer.pop(key, None)
            return super().instantiate_trainer(
                **kwargs,
                **{k: v for k, v in self.trainer_defaults.items() if k != "callbacks"},
                callbacks=self.trainer_defaults["callbacks"],
            )

    try:
        CLI(
            lightning_prompts.methods.PromptMethod,
            ImagesToPrompts,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            parser_class=Parser,
            trainer_defaults={
                "max_epochs": -1, "enable_checkpointing": False, "num_sanity_val_steps": 0, "limit_val_batches": 1,
                "enable_model_summary": False, "log_every_n_steps": 1, "use_distributed_sampler": False,
                "enable_progress_bar": False, "check_val_every_n_epoch": None, "val_check_interval": 10**9,
            },
            seed_everything_default=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )  # fmt: skip
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError("The device is out of memory; lower --model.microbatch.") from error


def _one_sentence(message: str, parser: Any) -> str:
    """The parser's many lines as one sentence, with the nearest setting that exists."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = re.sub(r"\s+", " ", " ".join(lines))
    unknown = re.search(
        r"[Uu]nrecognized arguments?: --?([\w.]+)|[Kk]ey '?([\w.]+)'? is not expected|Option '([\w.]+)' is not accepted",
        text,
    )
    if unknown:
        given = next(filter(None, unknown.groups()))
        names = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
        close = difflib.get_close_matches(given, sorted(names), 1)
        hint = f"; did you mean --{close[0]}?" if close else "; see --help for all settings."
        return f"The setting --{given} is unknown{hint}"
    return text[:400]

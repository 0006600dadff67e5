"""Lightning's command line for the methods of this package, with run folders, resuming and one-sentence errors."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import tempfile
from argparse import SUPPRESS
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import yaml
from jsonargparse import set_parsing_settings
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import SIGTERMException

from lightning_prompts.backbones.hub import pinned
from lightning_prompts.callbacks import Results, Scores
from lightning_prompts.commands import predict
from lightning_prompts.commands.arguments import prepare_arguments
from lightning_prompts.commands.check import check, config_with
from lightning_prompts.commands.descriptions import GROUP_TITLES, SETTING_HELP, describe, usage
from lightning_prompts.commands.dry_run import DryRun
from lightning_prompts.commands.plugins import import_plugins
from lightning_prompts.commands.processes import cluster_environment, processes
from lightning_prompts.commands.search_length import given_settings, set_length, take_over_settings
from lightning_prompts.commands.settings_checks import check_inputs, check_resumable, check_values
from lightning_prompts.commands.trainer_flags import HIDDEN_FLAGS, check_flags, check_precision
from lightning_prompts.data.prompts import read_prompts
from lightning_prompts.effort import Effort
from lightning_prompts.engine.checkpoint import AtomicCheckpointIO, is_checkpoint, last_checkpoint, parts_of, ranks_in
from lightning_prompts.engine.datamodule import ProblemData
from lightning_prompts.engine.loaders import PredictSettings
from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.errors import UserError, first_sentence
from lightning_prompts.launchers import Launched, own_rank
from lightning_prompts.methods import DPODiff, HumanFeedback, PromptMethod
from lightning_prompts.parser_errors import mistake_in, one_sentence, refused_class
from lightning_prompts.runner import TRAINER_DEFAULTS, build_trainer, held_folder, run_callbacks
from lightning_prompts.runs.atomic_io import atomic_write
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.lock import RunLock
from lightning_prompts.sampling import OUT_OF_MEMORY, out_of_memory
from lightning_prompts.terminal import say

LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")  # the others take the settings of `fit`
RUN_NAME = (
    "LIGHTNING_PROMPTS_RUN"  # environment variable by which rank 0 passes the run's name to the processes it starts
)

# A config is data: it may name classes of these modules and no others.
ALLOWED_MODULES = [
    "lightning_prompts",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.loggers",
    "pytorch_lightning.profilers",
    "pytorch_lightning.strategies",
    "torch.optim",
]


class Parser(LightningArgumentParser):
    """A parser that raises errors of one sentence.

    Attributes:
        hidden: Settings that the help text leaves out.
    """

    hidden: frozenset[str] = frozenset()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a UserError, where argparse would print the usage and exit."""
        raise UserError(one_sentence(message, self))

    def format_help(self) -> str:
        """Return the help text."""
        for action in self._actions:
            if action.dest.removesuffix(".help") in self.hidden:
                action.help = SUPPRESS  # only here: a setting without help would be missing in saved configs
        return super().format_help()


class CLI(LightningCLI):
    """Run one command. Like LightningCLI, it does so when it is constructed.

    Args:
        command: A command of Lightning, or `show-space`, `check` or `dry-run`, which take the settings of `fit`.
        run: The run's folder; None for a new one, named by time and method.
        args: The settings.
    """

    scores: Scores
    seeds: list[int]
    folder: RunFolder
    prediction: pl.Callback
    predict_settings: PredictSettings

    def __init__(self, command: str, run: Path | None, args: Sequence[str]) -> None:
        self.command, self.run = command, run
        self.lightning_command = command if command in LIGHTNING_COMMANDS else "fit"
        self.lock: RunLock | None = None  # on the run's folder; the first process holds it for all
        self.saved_config = ""  # the settings of `fit` as YAML
        self.given = given_settings(args)
        with ExitStack() as self.until_end:
            super().__init__(
                PromptMethod,
                ProblemData,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,
                parser_class=Parser,
                parser_kwargs={self.lightning_command: {"usage": usage(command), "description": describe(command)}},
                trainer_defaults=TRAINER_DEFAULTS,
                seed_everything_default=False,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                args=[self.lightning_command, *args],
            )

    # --- the parser

    def subcommands(self) -> dict[str, set[str]]:
        """Return this command alone: building the parser of each takes time."""
        return {self.lightning_command: LightningCLI.subcommands()[self.lightning_command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings that belong to no class."""
        help = "Seeds of the images, such as 0,1,2,3. By default 0, or 0,1,2,3 with --mix."
        parser.add_argument("--seeds", type=str | None, default=None, help=help)
        parser.add_class_arguments(Scores)
        if self.lightning_command == "fit":
            help = "Length of the search: a third of that of the settings (light), or three times as much (heavy)."
            parser.add_argument("--effort", type=Effort, default="medium", help=help)
        if self.command == "check":
            help = "New config to write, with the given settings of the model and data and the suggested changes."
            parser.add_argument("--write", type=str, default="", help=help)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Add the settings of `predict`, and adapt the help text to this package."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        assert isinstance(parser, Parser)
        if subcommand == "predict":
            predict.add_settings(parser)
        others = {"predict": {"ckpt_path"}, "fit": {"seeds"}}.get(self.command, {"ckpt_path", "seeds"})
        parser.hidden = HIDDEN_FLAGS | others
        for action in parser._actions:
            action.help = SETTING_HELP.get(action.dest, action.help)
        for key, group in (parser.groups or {}).items():
            group.title = GROUP_TITLES.get(key, group.title)
        return parser

    def _parse_ckpt_path(self) -> None:
        """Read no settings from a checkpoint, as Lightning would; they are in the run's folder."""

    # --- before any model is loaded

    def before_instantiate_classes(self) -> None:
        """Check the settings, prepare the run's folder, and find the checkpoint to resume from."""
        config = self.config[self.subcommand]
        check_precision(config.trainer.precision)
        check_values(config)
        check_flags(config)
        if self.subcommand == "fit":
            check_inputs(config)
            set_length(config, self.given)
        if self.command != "fit":
            config.trainer.logger = False
        if self.command == "show-space":
            return
        parts = self.until_end.enter_context(processes(config, self.command, self.run))
        self.seeds = predict.parse_seeds(config)
        mix = config.mix if self.command == "predict" else None
        self.scores = Scores(**{field.name: config[field.name] for field in fields(Scores)})
        if (self.subcommand in ("fit", "test") or mix) and own_rank() == 0:
            self.scores.check(config.model.init_args.backbone.offline)
        if self.command in ("check", "dry-run"):
            self._prepare_measurement(config)
            return
        self.folder = RunFolder(self.run or _new_run("mix" if mix else config.model.class_path.rsplit(".", 1)[-1]))
        if self.command == "fit":
            self._prepare_fit(config, parts)
        else:
            self._prepare_finished_run(config, mix)
        config.trainer.default_root_dir = str(RunFolder(mix[0]).path if mix else self.folder.path)

    def _prepare_measurement(self, config: Any) -> None:
        """Run `check` or `dry-run` in a temporary folder; keep the settings for `--write`, which needs a new file."""
        config.trainer.default_root_dir = self.until_end.enter_context(tempfile.TemporaryDirectory())
        if self.command == "dry-run":
            return
        logging.getLogger("lightning_prompts").setLevel(logging.WARNING)  # no progress to report in one step
        self.write = Path(config.write) if config.write else None
        if self.write and self.write.exists():
            raise UserError(
                f"--write must name a new file, and {str(self.write)!r} exists; give another name or remove it."
            )
        if self.write:
            given = yaml.safe_load(self._parser("fit").dump(config.clone()))
            self.settings = {
                part: {name: given[part][name] for name in ("class_path", "init_args")} for part in ("model", "data")
            }

    def _prepare_finished_run(self, config: Any, mix: list[str] | None) -> None:
        """Check and hold the folder of a run, or that of a mix of two; `validate` writes nothing, so it holds none."""
        config.ckpt_path = None
        if not mix:
            self.folder.check()
            if self.command in ("test", "predict") and own_rank() == 0:
                folders = (self.folder.problems,) if self.command == "test" else ()
                self.folder.check_writable(*folders, instead="copy it to where it can be")
        if self.command != "validate" and own_rank() == 0:
            self.lock = self.until_end.enter_context(held_folder(self.folder))
        if self.command == "predict":
            self.predict_settings, self.prediction = predict.prepare_prediction(
                config, self.folder, self.scores, self.seeds
            )
            config.return_predictions = False  # they are written to files

    def _prepare_fit(self, config: Any, parts: int) -> None:
        """Hold and prepare the run's folder, and find the checkpoint to resume from."""
        launched = Launched.detect()
        restarted = launched and launched.by == "torchrun" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if restarted and config.ckpt_path is None:
            config.ckpt_path = "last"  # torchrun has restarted all processes because one was lost
        if config.ckpt_path not in (None, "last") and not is_checkpoint(Path(config.ckpt_path)):
            raise UserError(
                f"There is no checkpoint of a search in {config.ckpt_path}; give another or --ckpt_path last."
            )
        if own_rank() == 0:
            self.lock = self.until_end.enter_context(held_folder(self.folder))
            self.folder.prepare(resume=bool(config.ckpt_path))
        resumes = bool(config.ckpt_path) and self.folder.config.exists()
        model = config.model.init_args.backbone
        if resumes:
            take_over_settings(config, self.folder.saved, self.given)
        # Save the commit and the variant, so that later commands read the same weights.
        model.revision, model.variant = pinned(model.name, model.offline, model.revision, model.variant)
        if own_rank() == 0:
            dumped = self._parser("fit").dump(config.clone())
            if resumes:
                check_resumable(self.folder, dumped)
            once = re.sub(r"(?m)^ckpt_path:.*$", "ckpt_path: null", re.sub(r"(?m)^effort:.*\n", "", dumped))
            self.saved_config = self.folder.saved.with_header(once, config.effort)
        if config.ckpt_path == "last":
            config.ckpt_path = _last_checkpoint(self.folder.checkpoints, own_rank() if parts > 1 else 0, parts)
        config.weights_only = True

    # --- the Trainer

    def instantiate_classes(self) -> None:
        """Instantiate method, data and Trainer; refuse a method with data of another kind."""
        super().instantiate_classes()
        wanted = self.model.data_class
        if not isinstance(self.datamodule, wanted):
            method = type(self.model).__name__
            raise UserError(f"{method} does not take {type(self.datamodule).__name__}; give --data {wanted.__name__}.")
        if self.command == "predict":
            self.datamodule.predict_settings = self.predict_settings

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the Trainer with the callbacks of the command."""
        settings = {**self._get(self.config_init, "trainer"), **kwargs}
        if self.command == "show-space":
            return build_trainer(settings | {"plugins": [cluster_environment()], "enable_checkpointing": False}, [])
        if self.command in ("check", "dry-run"):
            self.measurement = DryRun(self.scores, silent=self.command == "check")
            settings |= {"plugins": [cluster_environment()], "enable_checkpointing": False}
            return build_trainer(settings, [self.measurement])
        config = self.config[self.subcommand]
        recorded = {part: config[part].init_args.as_dict() for part in ("model", "data")} | {
            "scores": asdict(self.scores)
        }
        results = self.prediction if self.command == "predict" else Results(self.scores, settings=recorded)
        given = settings["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        callbacks = run_callbacks(
            self.lock, results, user_callbacks=given, folder=self.folder, config=self.saved_config
        )
        settings |= {"logger": self._logger(), "plugins": [AtomicCheckpointIO(), cluster_environment()]}
        return build_trainer(settings, callbacks)

    def _logger(self) -> Any:
        """Return the given loggers of a search, or TensorBoard's in its folder; other commands have none."""
        if self.command != "fit":
            return False
        given = self._get(self.config_init, "trainer").logger
        default = given is None or given is True
        return pl.loggers.TensorBoardLogger(self.folder.path, name="", version="") if default else given

    def fit(self, model: PromptMethod, datamodule: ProblemData, **kwargs: Any) -> None:
        """Search, check or measure, or show the space that would be searched."""
        if self.command in ("check", "dry-run") and isinstance(model, HumanFeedback):
            raise UserError(f"A user's choices cannot be measured; give {self.command} the config of another method.")
        if self.command == "show-space":
            _show_space(model, datamodule)
            return
        self.trainer.fit(model, datamodule=datamodule, **kwargs)
        if self.command == "check":
            self._check(model, datamodule)

    def _check(self, model: PromptMethod, datamodule: ProblemData) -> None:
        """Check the model on the problems of the step just taken; exit with 1 if it does not react to its prompt."""
        with self.trainer.precision_plugin.forward_context():
            report = check(model.to(self.trainer.strategy.root_device), datamodule.seed, self.measurement)
        say(*report.lines)
        if self.write and report.reacts:
            atomic_write(self.write, config_with(self.settings, report.suggestion).encode())
            say(f"These settings are in {self.write}: train.py fit --config {self.write}")
        if not report.reacts:
            sys.exit(1)


def run_command(args: Sequence[str], run: Path | None) -> None:
    """Run a command; raise a UserError, or exit, for the errors and signals that Lightning reports.

    Args:
        args: The command and its settings, without --run.
        run: The run's folder; None for a new one, named by time and method.

    Raises:
        UserError: The settings are wrong, or the memory is not enough.
    """
    command, *settings = args
    if command != "fit" and any(re.match(r"--trainer\.logger\b", arg) for arg in settings):
        raise UserError(f"--trainer.logger has no effect on {command!r}, which logs nothing; leave it out.")
    for name in ("pytorch_lightning", "lightning_fabric"):  # they set their level when they are imported
        logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.ERROR)
    settings, plugins = import_plugins(settings)
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*ALLOWED_MODULES, *plugins])
    try:
        CLI(command, run, prepare_arguments(command, settings))
    except MisconfigurationException as error:
        raise UserError(first_sentence(error)) from error
    except ValueError as error:
        if mistake := mistake_in(error):
            raise mistake from None
        if refused := refused_class(error):
            raise UserError(refused) from error
        raise
    except ModuleNotFoundError as error:
        if error.name is None:  # a package that Lightning looks for, as for a TPU
            raise UserError(first_sentence(error)) from error
        raise
    except SIGTERMException:  # a SystemExit with code 0
        sys.exit(128 + signal.SIGTERM)
    except SystemExit as stop:  # Lightning exits with code 1 after Ctrl-C
        if isinstance(stop.__context__, KeyboardInterrupt):
            sys.exit(128 + signal.SIGINT)
        raise
    except RuntimeError as error:
        if out_of_memory(error):
            raise UserError(OUT_OF_MEMORY) from error
        raise


def _show_space(model: PromptMethod, datamodule: ProblemData) -> None:
    """Print the candidate words of each prompt."""
    if not isinstance(model, DPODiff) or not isinstance(datamodule, Prompts):
        raise UserError("Only DPODiff has a space to show; give --config configs/dpo_diff.yaml.")
    for prompt in read_prompts(datamodule.prompts):
        space = model.space(prompt)
        say(f"{prompt}: {space.size} candidates", "", *space.table(), "")


def _last_checkpoint(folder: Path, rank: int, parts: int) -> str | None:
    """Return the checkpoint to resume from: this rank's, or any rank's if the problems were divided into other parts.

    In that case all checkpoints are read.
    """
    if own := last_checkpoint(folder, rank):
        return str(own)
    others = (last_checkpoint(folder, other) for other in ranks_in(folder))
    other = next(filter(None, others), None)
    return str(other) if other and parts_of(other) != parts else None


def _new_run(method: str) -> Path:
    """Return the default folder of a run, which the processes that rank 0 starts read from the environment."""
    if own_rank() == 0:
        os.environ[RUN_NAME] = RunFolder.name(method, datetime.now())
    elif RUN_NAME not in os.environ:
        raise UserError("Processes started by another launcher need a common folder; give --run runs/NAME.")
    return Path("runs") / os.environ[RUN_NAME]

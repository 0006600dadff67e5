"""Lightning's command line over this package's methods: run folders, resuming and one-sentence errors."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from datetime import datetime
from math import isfinite
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args

import pytorch_lightning as pl
import yaml
from jsonargparse import set_parsing_settings
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import SIGTERMException

from lightning_prompts import methods
from lightning_prompts.backbones.embedding_files import split_name
from lightning_prompts.backbones.hub import pinned
from lightning_prompts.callbacks import OwnerGuard, Results, Scores, check_seeds
from lightning_prompts.commands.check import check, written
from lightning_prompts.commands.dry_run import DryRun
from lightning_prompts.commands.interpolate import Between
from lightning_prompts.commands.mix import Mix, parents_of
from lightning_prompts.commands.parser_errors import mistake_in, one_sentence, refused_class
from lightning_prompts.data.images import check_sources, find_targets
from lightning_prompts.data.prompts import Prompts, find_prompts, read_prompts
from lightning_prompts.distributed import ranks_of
from lightning_prompts.engine.checkpoint import (
    AtomicCheckpointIO,
    PromptCheckpoint,
    SavedConfig,
    is_checkpoint,
    last_checkpoint,
    parts_of,
    ranks_in,
)
from lightning_prompts.engine.datamodule import ProblemData
from lightning_prompts.errors import UserError, first_sentence
from lightning_prompts.launchers import Launched, own_rank, started_by_lightning, starting_others
from lightning_prompts.methods import TRAINER, DPODiff, HumanFeedback, PromptMethod
from lightning_prompts.methods.inversion.init import looks_like_file
from lightning_prompts.runs.atomic_io import atomic_write
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.runs.lock import RunLock
from lightning_prompts.sampling import OUT_OF_MEMORY, out_of_memory
from lightning_prompts.setting_types import Positive
from lightning_prompts.terminal import say
from lightning_prompts.text_settings import Text, all_settings, keep_texts, text_settings, with_groups

log = logging.getLogger(__name__)

LIGHTNINGS = ("fit", "validate", "test", "predict")  # commands
HALF = ("16", "16-true", "16-mixed", "bf16-true", "transformer-engine", "transformer-engine-float16")

# Settings that a search can go on with when they differ from those it was begun with.
MAY_CHANGE = {
    "chooser",
    "images",
    "prompts",
    "steps",
    "patience",
    "together",
    "workers",
    "retry",
    "microbatch",
    "backbone.gradient_checkpointing",
    "backbone.vae_tiling",
    "backbone.cpu_offload",
    "backbone.offline",
    "score_every",
    "sample_every",
    "sampler.num_inference_steps",
}

# A config is data: it can name classes of these modules and no others.
ALLOWED = [
    "lightning_prompts",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.loggers",
    "pytorch_lightning.profilers",
    "pytorch_lightning.strategies",
]


# Texts are not optional: jsonargparse would take `# one` or `~` for nothing.
PREDICT: list[tuple[str, Any, Any, str]] = [
    ("--frames", Positive, 12, "of a path: pictures from one end to the other"),
    ("--prompts", str | list[str], [], "texts to draw instead of the found prompts"),
    ("--negative", str, "", "what to lead away from: a text, or a run, of which all prompts are taken"),
    ("--generations", Positive, 4, "of a mix: how often the chosen prompts have children"),
    ("--population", Positive, 16, "of a mix: children of a generation"),
    ("--select", Positive, 4, "of a mix: prompts that the score keeps for the next generation"),
    ("--choose", Literal["score", "hand"], "score", "of a mix: whether the score chooses or you"),
]


class Parser(LightningArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises instead of printing thirty lines."""
        raise UserError(one_sentence(message, self))


class CLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict` in a run's folder."""

    command = "fit"
    run: Path | None = None
    made: RunFolder | None = None  # by this command, and gone again if it is refused
    held = ExitStack()  # until the command ends
    lock: RunLock | None = None  # of the run's folder, which the first process holds for all
    instead = ""  # `show-space`, a `fit` that ends before it begins, or `dry-run` or `check`, which end after a step
    saved = ""  # settings of a `fit`, as they are written

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The one that was asked for; each has hundreds of settings, whose parser takes time to build."""
        return {CLI.command: LightningCLI.subcommands()[CLI.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what belongs to no class."""
        help = "seeds that `predict` draws from, such as 0,1,2,3; by default 0, for a mix 0,1,2,3"
        parser.add_argument("--seeds", type=str | None, default=None, help=help)
        parser.add_class_arguments(Scores)
        if self.instead == "check":
            parser.add_argument(
                "--write", type=str, default="", help="write the settings with what `check` suggests to this file"
            )

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Adds what `predict` alone takes."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            for name, type_, default, help in PREDICT:
                parser.add_argument(name, type=type_, default=default, help=help)
            parser.add_argument(
                "--path", type=str, nargs=2, help="two texts, or files of an embedding, to draw what lies between"
            )
            parser.add_argument(
                "--mix", type=str, nargs=2, help="two runs whose prompts are recombined, see docs/uses.md"
            )
        return parser

    def before_instantiate_classes(self) -> None:
        """Prepares the run's folder and finds the state to go on from."""
        command = self.config.subcommand
        config = self.config[command]
        if str(config.trainer.precision) in HALF:
            raise UserError(
                f"The precision {config.trainer.precision} would round the prompts or their gradients to half precision, which "
                "ruins their optimisation; use 32-true or bf16-mixed, and --model.backbone.dtype for the frozen weights."
            )
        _refuse_nulls(config)
        _refuse_flags(config)
        if self.instead == "show-space":
            _check_inputs(config)
            config.trainer.logger = False
            return
        if command == "fit":
            _check_inputs(config)
        else:
            config.trainer.logger = False  # that of the search, in its saved settings
        parts = self._divide(config, command)
        mix = config.mix if command == "predict" else None
        try:
            self.seeds = [int(seed) for seed in (config.seeds or ("0,1,2,3" if mix else "0")).split(",")]
        except ValueError:
            raise UserError(f"--seeds takes whole numbers such as 0,1,2,3, not {config.seeds!r}.") from None
        check_seeds("--seeds", self.seeds)
        self.scores = Scores(**{field.name: config[field.name] for field in fields(Scores)})
        if (command in ("fit", "test") or mix) and own_rank() == 0:
            self.scores.check(config.model.init_args.backbone.offline)
        method = "mix" if mix else config.model.class_path.rsplit(".", 1)[-1]
        if self.instead == "check":
            self._prepare_check(config)
        if self.instead in ("check", "dry-run"):
            self.scratch = tempfile.TemporaryDirectory()
            config.trainer.default_root_dir, config.trainer.logger = self.scratch.name, False
            return
        self.folder = RunFolder(self.run or Path("runs") / _run_name(method))
        if command == "fit":
            self._prepare(config, parts)
        else:
            config.ckpt_path = None
            if not mix:
                self.folder.check()
                if command in ("test", "predict") and own_rank() == 0:
                    folders = (self.folder.problems,) if command == "test" else ()
                    self.folder.check_writable(*folders, instead="copy it to where it can be")
            if command != "validate" and own_rank() == 0:  # which writes nothing
                self._hold()
        if command == "predict":
            self.drawn = self._predicted(config)
        config.trainer.default_root_dir = str(RunFolder(mix[0]).path if mix else self.folder.path)

    def _prepare_check(self, config: Any) -> None:
        """Keep the settings that `--write` writes; refuse a file that exists before anything is loaded."""
        logging.getLogger("lightning_prompts").setLevel(logging.WARNING)  # one step is no progress to report
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

    def _check(self, model: PromptMethod, datamodule: ProblemData) -> None:
        """Check the model on the problems of the step that was taken, and exit with 1 if it does not react to its prompt."""
        (measured,) = (callback for callback in self.trainer.callbacks if isinstance(callback, DryRun))  # type: ignore[attr-defined]
        with self.trainer.precision_plugin.forward_context():
            report = check(model.to(self.trainer.strategy.root_device), datamodule.seed, measured)
        say(*report.lines)
        if self.write and report.reacts:
            atomic_write(self.write, written(self.settings, report.suggestion).encode())
            say(f"These settings are in {self.write}: train.py fit --config {self.write}")
        if not report.reacts:
            sys.exit(1)

    def _predicted(self, config: Any) -> pl.Callback:
        """What draws for `predict`: the found prompts, other texts or a mix of two runs."""
        prompts, negative = config.prompts or (), negative_text(config.negative)
        if config.path:
            if config.mix or prompts or negative:
                raise UserError("--path is drawn alone; give it without --mix, --prompts and --negative.")
            first, last = config.path
            return Between(self.folder, first, last, self.seeds, int(config.frames))
        if not config.mix:
            prompts = [prompts] if isinstance(prompts, str) else prompts
            return Results(self.scores, self.seeds, prompts=prompts, negative=negative)
        if prompts:
            raise UserError("--mix draws children of found prompts and --prompts other texts; give one of the two.")
        parents = parents_of(config.mix)
        if own_rank() == 0:
            self.folder.prepare(resume=False, search=False)
        how = {name: config[name] for name in ("generations", "population", "select", "choose")}
        return Mix(self.folder, parents, seeds=self.seeds, negative=negative, scores=self.scores, **how)

    def _parse_ckpt_path(self) -> None:
        """Reads no settings from checkpoints, as Lightning does; the run's folder has them."""

    def _divide(self, config: Any, command: str) -> int:
        """Chooses how the ranks divide the work, before the model is loaded; into how many parts the problems are divided."""
        launched = Launched.detect()
        if launched and launched.processes * launched.machines > 1 and not self.run and not self.instead:
            raise UserError(f"Processes started by {launched.by} need a common folder; give --run runs/NAME.")
        config.trainer.devices, config.trainer.num_nodes, ranks = ranks_of(config.trainer, launched)
        if command != "fit" or self.instead:
            config.trainer.strategy = "auto"
            if not launched:
                config.trainer.devices = config.trainer.num_nodes = 1
            return 1
        strategy = config.trainer.strategy
        if strategy not in ("auto", "problems", "samples"):
            raise UserError(
                f"The strategy {strategy!r} divides a model or its gradients, of which there are none here; give --trainer.strategy "
                "problems (each process its own) or samples (all the same, each a share of the work)."
            )
        if ranks == 1:
            config.trainer.strategy = "auto"
            return 1
        if config.model.class_path.endswith("HumanFeedback"):
            raise UserError("HumanFeedback asks one person, so that it runs in one process; give --trainer.devices 1.")
        given = count_of(config.data)
        if strategy == "auto":
            strategy = config.trainer.strategy = "problems" if given >= ranks else "samples"
        if strategy == "problems" and given < ranks and own_rank() == 0:
            log.warning(
                "%d of %d processes have nothing to do, as there are %d problems; --trainer.strategy samples divides the work on each.",
                *(ranks - given, ranks, given),
            )
        if not launched and not started_by_lightning():
            CLI.held.enter_context(starting_others())
        return ranks if strategy == "problems" else 1

    def _hold(self) -> None:
        """Hold the run's folder until the command ends."""
        new = not self.folder.path.exists()
        CLI.lock = CLI.held.enter_context(self.folder.locked())
        CLI.made = self.folder if new else None

    def _prepare(self, config: Any, parts: int) -> None:
        launched = Launched.detect()
        restarted = launched and launched.by == "torchrun" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if restarted and config.ckpt_path is None:
            config.ckpt_path = "last"  # torchrun has started the processes again, as one of them was lost
        if config.ckpt_path not in (None, "last") and not is_checkpoint(Path(config.ckpt_path)):
            raise UserError(
                f"There is no checkpoint of a search in {config.ckpt_path}; give another or --ckpt_path last."
            )
        if own_rank() == 0:
            self._hold()
            self.folder.prepare(resume=bool(config.ckpt_path))
        begun = bool(config.ckpt_path) and self.folder.config.exists()
        model = config.model.init_args.backbone
        for name in ("revision", "variant"):
            if begun and model[name] is None:
                model[name] = self.folder.saved_settings()["model"]["init_args"]["backbone"].get(name)
        # What is saved is the commit and the variant, so that later commands read the same weights.
        model.revision, model.variant = pinned(model.name, model.offline, model.revision, model.variant)
        if own_rank() == 0:
            dumped = self._parser("fit").dump(config.clone())
            if begun:
                _check_same(self.folder, dumped)
            self.saved = self.folder.with_origin(re.sub(r"(?m)^ckpt_path:.*$", "ckpt_path: null", dumped))
        if config.ckpt_path == "last":
            config.ckpt_path = self._last(own_rank() if parts > 1 else 0, parts)
        config.weights_only = True

    def _last(self, rank: int, parts: int) -> str | None:
        """The checkpoint to go on from: this rank's or, if the problems were divided into other parts, any rank's, as all are read."""
        folder = self.folder.checkpoints
        if own := last_checkpoint(folder, rank):
            return str(own)
        others = (last_checkpoint(folder, other) for other in ranks_in(folder))
        other = next(filter(None, others), None)
        return str(other) if other and parts_of(other) != parts else None

    def instantiate_classes(self) -> None:
        """Refuses a method that gets another method's data."""
        super().instantiate_classes()
        wanted = self.model.data_class
        if not isinstance(self.datamodule, wanted):
            method = type(self.model).__name__
            raise UserError(f"{method} does not take {type(self.datamodule).__name__}; give --data {wanted.__name__}.")

    def fit(self, model: PromptMethod, datamodule: ProblemData, **kwargs: Any) -> None:
        """Searches, or shows what would be searched."""
        if self.instead in ("check", "dry-run") and isinstance(model, HumanFeedback):
            raise UserError(f"A person's choices cannot be measured; give {self.instead} the config of another method.")
        if self.instead != "show-space":
            self.trainer.fit(model, datamodule=datamodule, **kwargs)
            if self.instead == "check":
                self._check(model, datamodule)
        elif not isinstance(model, DPODiff) or not isinstance(datamodule, Prompts):
            raise UserError("Only DPODiff has a space to show; give --config configs/dpo_diff.yaml.")
        else:
            for prompt in read_prompts(datamodule.prompts):
                space = model.space(prompt)
                say(f"{prompt}: {space.size} candidates", "", *space.table(), "")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the Trainer; what it refuses is one sentence."""
        try:
            return self._trainer(**kwargs)
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"The Trainer refuses its settings: {first_sentence(error)}") from error

    def _loggers(self, command: str) -> Any:
        """Return the loggers of a search that were given, or TensorBoard's in its folder; other commands have none."""
        if command != "fit":
            return False
        given = self._get(self.config_init, "trainer").logger
        by_default = given is None or given is True
        return pl.loggers.TensorBoardLogger(self.folder.path, name="", version="") if by_default else given

    def _trainer(self, **kwargs: Any) -> pl.Trainer:
        """Add this package's callbacks to the user's."""
        if self.instead:
            measuring = [] if self.instead == "show-space" else [DryRun(self.scores, self.instead == "check")]
            return super().instantiate_trainer(
                **kwargs, callbacks=measuring, plugins=[_environment()], enable_checkpointing=False
            )
        command = self.config.subcommand
        config = self.config[command]
        settings = {part: config[part].init_args.as_dict() for part in ("model", "data")}
        settings["scores"] = asdict(self.scores)
        given = self._get(self.config_init, "trainer").callbacks or []
        results = self.drawn if command == "predict" else Results(self.scores, settings=settings)
        saving = [SavedConfig(self.folder.config, self.saved)] if self.saved else []
        return super().instantiate_trainer(
            **kwargs,
            logger=self._loggers(command),
            callbacks=[OwnerGuard(self.lock), *given, results, *saving, PromptCheckpoint(self.folder.checkpoints)],
            plugins=[AtomicCheckpointIO(), _environment()],
        )


FITTING = TRAINER | {"enable_checkpointing": True}  # for our callback; Lightning adds no other beside it
FLAGS = {  # of Lightning that have no meaning for a search, and what has
    "max_steps": "--data.steps, --model.steps or --model.budget says how long a search is",
    "min_steps": "--model.patience says when a search may end",
    "max_epochs": "--data.steps, --model.steps or --model.budget says how long a search is",
    "min_epochs": "--model.patience says when a search may end",
    "fast_dev_run": "train.py dry-run tries one step",
    "overfit_batches": "--data.images or --data.prompts names what is searched",
    "limit_train_batches": "--data.steps, --model.steps or --model.budget says how long a search is",
    "limit_val_batches": "a search does not validate; --model.score_every says how often prompts are scored",
    "val_check_interval": "a search does not validate; --model.score_every says how often prompts are scored",
    "check_val_every_n_epoch": "a search does not validate; --model.score_every says how often prompts are scored",
    "gradient_clip_val": "methods limit their steps themselves, as PH2P does with --model.max_step_norm",
    "gradient_clip_algorithm": "methods limit their steps themselves, as PH2P does with --model.max_step_norm",
    "accumulate_grad_batches": "--data.samples says how many samples a step has, and --model.microbatch how many at a time",
    "reload_dataloaders_every_n_epochs": "a search has one epoch",
    "limit_test_batches": "test scores each prompt that was found",
    "limit_predict_batches": "predict draws from each prompt that was found",
    "num_sanity_val_steps": "a search does not validate; --model.score_every says how often prompts are scored",
    "use_distributed_sampler": "--trainer.strategy says how processes divide the work",
    "log_every_n_steps": "each better prompt is logged; --model.sample_every says how often images are",
    "enable_checkpointing": "a search always keeps its two newest checkpoints",
    "enable_model_summary": "the prompt is all that is optimized",
    "enable_autolog_hparams": "the run's config.yaml has its settings",
    "model_registry": "prompts and embeddings are saved in the run's folder",
    "default_root_dir": "--run names the folder",
    "plugins": "a search brings its own",
    "sync_batchnorm": "the models are frozen",
}


def _refuse_flags(config: Any) -> None:
    """Refuse Lightning's flags that would do nothing or end a search before it has begun, and name the setting to use instead."""
    if config.seed_everything is not False:
        raise UserError(
            "--seed_everything has no effect on a search, whose draws depend on --data.seed; give that one."
        )
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(pl.Trainer).parameters.items()
    } | FITTING
    for name, instead in FLAGS.items():
        if name in config.trainer and config.trainer[name] != defaults[name]:
            raise UserError(f"--trainer.{name} does not fit a search ({instead}); leave it out.")
    if config.trainer.max_time is not None:
        _check_duration(config.trainer.max_time)


def _check_duration(given: Any) -> None:
    """Refuse a --trainer.max_time that is no duration, or that ends a search before its first step."""
    try:
        seconds = pl.callbacks.Timer(given).time_remaining()
    except (MisconfigurationException, TypeError, ValueError):
        seconds = None
    if seconds is None or seconds <= 0:
        raise UserError(
            f"--trainer.max_time cannot be {str(given)!r}; it takes a duration as days:hours:minutes:seconds, such as 00:01:30:00."
        )


def _refuse_nulls(config: Any) -> None:
    """Refuse null where a setting takes none, and numbers that are not finite, which the parser lets pass."""
    for part in ("model", "data"):
        module, _, name = config[part].class_path.rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        hints = dict(with_groups(all_settings(kind)))
        for setting, value in vars(config[part].init_args.as_flat()).items():
            hint = hints.get(setting, Any)
            if value is None and hint is not Any and NoneType not in get_args(hint):
                raise UserError(f"The setting --{part}.{setting} cannot be null; give a value, or leave it out.")
            if isinstance(value, float) and not isfinite(value):
                raise UserError(f"The setting --{part}.{setting} cannot be {value}; it takes a finite number.")


def _check_inputs(config: Any) -> None:
    """Name inputs that are missing before a model is loaded, which may take minutes."""
    how, model = config.data.init_args, config.model.init_args
    if "prompts" in how:
        find_prompts([how.prompts] if isinstance(how.prompts, str) else how.prompts)
    else:
        check_sources([how.images] if isinstance(how.images, str) else how.images)
        if how.negative_images:
            check_sources([how.negative_images] if isinstance(how.negative_images, str) else how.negative_images)
    start, dictionary = model.get("start"), model.get("dictionary", "")
    if start and looks_like_file(start) and not os.path.exists(split_name(start)[0]):
        raise UserError(f"There is neither a run nor an embedding in {start!r} to start from; check --model.start.")
    if dictionary.endswith(".json") and not os.path.isfile(dictionary):
        raise UserError(f"There is no file {dictionary!r}; check --model.dictionary.")


def count_of(data: Any) -> int:
    """How many problems the inputs are, at least."""
    how = data.init_args
    if data.class_path.rpartition(".")[2] == Prompts.__name__:
        return len(find_prompts([how.prompts] if isinstance(how.prompts, str) else how.prompts))
    return len(find_targets([how.images] if isinstance(how.images, str) else how.images, how.one_subject))


def _environment() -> ClusterEnvironment:
    """Tell Lightning who has started this process, which it would guess otherwise.

    SLURM's job is queued again by its own script, as it goes on from the checkpoints of all ranks.
    """
    launched = Launched.detect()
    if launched is None:
        return LightningEnvironment()
    return TorchElasticEnvironment() if launched.by == "torchrun" else SLURMEnvironment(auto_requeue=False)


def run_command(args: Sequence[str], run: Path | None) -> None:
    """Runs one command.

    Args:
        args: The command and its settings, without --run.
        run: The run's folder; None for a new one named by time and method.
    """
    if args[0] != "fit" and any(re.match(r"--trainer\.logger\b", arg) for arg in args):
        raise UserError(f"--trainer.logger has no effect on {args[0]!r}, which logs nothing; leave it out.")
    for name in ("pytorch_lightning", "lightning_fabric"):  # their level is set when they are imported
        logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.ERROR)
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=ALLOWED)
    CLI.run, CLI.made, CLI.instead = run, None, "" if args[0] in LIGHTNINGS else args[0]
    CLI.command = "fit" if CLI.instead else args[0]
    CLI.lock = None
    with ExitStack() as CLI.held:
        try:
            _run(args)
        except BaseException:
            if CLI.made and not (CLI.lock and CLI.lock.taken):  # it goes again unless a search has begun in it
                CLI.made.discard()
            raise


def _run(args: Sequence[str]) -> None:
    """Runs it, and makes a sentence or an exit code of what Lightning raises."""
    try:
        CLI(
            PromptMethod,
            ProblemData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            parser_class=Parser,
            trainer_defaults=FITTING,
            seed_everything_default=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=_with_texts(_with_data_class([CLI.command, *args[1:]])),
        )
    except MisconfigurationException as error:
        raise UserError(first_sentence(error)) from error
    except ValueError as error:
        if mistake := mistake_in(error):
            raise mistake from None
        if refused := refused_class(error):
            raise UserError(refused) from error
        raise
    except ModuleNotFoundError as error:
        if error.name is None:  # a package that Lightning has looked for, as for a TPU
            raise UserError(first_sentence(error)) from error
        raise
    except SIGTERMException:  # a SystemExit with code 0
        sys.exit(128 + signal.SIGTERM)
    except SystemExit as stop:  # Lightning turns Ctrl-C into exit code 1
        if isinstance(stop.__context__, KeyboardInterrupt):
            sys.exit(128 + signal.SIGINT)
        raise
    except RuntimeError as error:
        if out_of_memory(error):
            raise UserError(OUT_OF_MEMORY) from error
        raise


def _with_data_class(args: list[str]) -> list[str]:
    """Puts the data's class first, as the setting tells that only it has; a config or --data that comes later wins."""
    given = [arg for arg in args if arg.startswith("--data.") and not arg.startswith("--data.help")]
    name = "Prompts" if any(arg.startswith("--data.prompts") for arg in given) else "ImagesToPrompts"
    return [args[0], "--data", name, *args[1:]] if given else args


def _with_texts(args: list[str]) -> list[str]:
    """Keep the parser from reading texts as YAML, see `keep_texts`."""
    settings = {"data": text_settings(ProblemData), "model": text_settings(PromptMethod), "": text_settings(Scores)}
    if args[0] == "predict":
        settings[""]["prompts"] = Text(several=True, optional=False)
    kept = keep_texts(args, settings)
    if empty := next((arg for arg in kept if re.fullmatch(r"--[\w.]+=", arg)), None):
        raise UserError(f"The setting {empty[:-1]} cannot be empty; give a value, or leave it out.")
    return kept


def _check_same(folder: RunFolder, wanted: str) -> None:
    """Refuses to go on with a search under settings that would make its past and its future two different searches."""
    before, now = folder.saved_settings(), yaml.safe_load(wanted)
    may_change = MAY_CHANGE - getattr(methods, now["model"]["class_path"].rpartition(".")[2]).decisive
    differ: list[tuple[str, str, str]] = []
    for part in ("model", "data"):
        old, new = (flat(run[part]["init_args"]) | {"class_path": run[part].get("class_path")} for run in (before, now))
        for name in sorted(old.keys() & new.keys() - may_change):
            if old[name] != new[name]:
                setting = f"--{part}" if name == "class_path" else f"--{part}.{name}"
                differ.append((setting, json.dumps(old[name]), json.dumps(new[name])))
    if differ:
        begun = ", ".join(f"{setting} {old}" for setting, old, _ in differ)
        wanted = ", ".join(new for *_, new in differ)
        raise UserError(
            f"The run in {folder.path} was begun with {begun} and cannot go on with {wanted}; give the former or another --run."
        )


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by name, those of the groups `backbone` and `sampler` as `backbone.dtype`."""
    groups = {name: value for name, value in settings.items() if name in ("backbone", "sampler")}
    inner = {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}
    return {name: value for name, value in settings.items() if name not in groups} | inner


def negative_text(given: str) -> str:
    """A text as it is, or what a run has found: the prompts of all its pictures, with commas between."""
    folder = os.path.dirname(given)
    if given and (os.path.isdir(given) or os.path.isdir(folder)):  # in a folder that exists, it is a run or misspelt
        return ", ".join(str(problem.prompt) for problem in RunFolder(given).hard_prompts())
    return given


def _run_name(method: str) -> str:
    """The default name; further ranks, which run the same command, learn it from rank 0 and not from their own clock."""
    if own_rank() == 0:
        os.environ["LIGHTNING_PROMPTS_RUN"] = RunFolder.name(method, datetime.now())
    elif "LIGHTNING_PROMPTS_RUN" not in os.environ:
        raise UserError("Processes started by another launcher need a common folder; give --run runs/NAME.")
    return os.environ["LIGHTNING_PROMPTS_RUN"]

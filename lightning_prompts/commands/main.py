"""The command line: Lightning's, with one-sentence errors, run folders and exit codes 0, 2, 130 and 143.

0 is success, 2 a person's mistake, 130 Ctrl-C and 143 SIGTERM.
"""

from __future__ import annotations

import difflib
import errno
import json
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from yaml import YAMLError

from lightning_prompts.errors import UserError
from lightning_prompts.launchers import Launched
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.terminal import close, prepare, say

ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space, and continue a search with --run and --ckpt_path last"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "permit writing there, or give another place"),
}
COMMANDS = ("fit", "validate", "test", "predict", "show-space", "check", "dry-run", "prefetch")
MOST_NESTED, MOST_ALIASES = 50, 10  # in a config
HELP = """usage: train.py COMMAND [--config FILE] [--run FOLDER] [settings]

  fit       search prompts:         train.py fit --config configs/invert.yaml --data.images photo.png
  validate  score found prompts:    train.py validate --run runs/NAME
  test      draw from the prompts:  train.py test --run runs/NAME
  predict   draw more pictures:     train.py predict --run runs/NAME --seeds 0,1,2,3
            mix two found prompts:  train.py predict --mix runs/NAME runs/OTHER
  show-space  words that a search would choose from:  train.py show-space --config configs/dpo_diff.yaml --data.prompts "a dog"
  check     measure whether a search can work on a model:  train.py check (settings of fit) --write mine.yaml
  dry-run   memory and time that a search would take, and how to lower them:  train.py dry-run (settings of fit)
  prefetch  download models to be used later or offline:  train.py prefetch sdxl

General settings of a command: train.py COMMAND --help; of a method: train.py fit --model.help PH2P;
of the pictures and the schedule: train.py fit --data.help ImagesToPrompts
"""


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command and exits.

    Args:
        args: Command line; by default the process's.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        say(*HELP.splitlines())  # without importing Lightning, which takes seconds
        return None
    _manners()
    run = None
    try:
        _check_order(args)
        if args[0] == "prefetch":
            from lightning_prompts.commands.prefetch import prefetch

            return prefetch(args[1:])
        _check_values(args)
        run, args = _with_run_config(args)
        _check_configs(args)
        if "--help" not in args and "-h" not in args:
            Launched.detect()  # before Lightning, which fails on a rank that is no number
        from lightning_prompts.commands.cli import run_command  # takes seconds to import

        run_command(args, run)
    except UserError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("lightning_prompts"):
            raise
        _refuse(
            f"The package {error.name!r} is not installed for {sys.executable}; activate the environment, or run pip install -e ."
        )
    except OSError as error:
        file = error.filename or (f"A file in {run}" if run else "A file")
        reason = f"{file} cannot be used ({error.strerror or error})"
        _refuse(f"{reason}; {ADVICE.get(error.errno or 0, 'check the path and its permissions')}.")
    finally:
        close()


def _refuse(message: str) -> NoReturn:
    say(f"error: {' '.join(message.split())}", stream=sys.stderr)
    sys.exit(2)


def _manners() -> None:
    warnings.filterwarnings(
        "ignore", module=r"pytorch_lightning|lightning_fabric|torch|diffusers|transformers|jsonargparse|PIL"
    )
    prepare()


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


def _check_values(args: list[str]) -> None:
    """Name the setting that has no value, for which the parser would name another."""
    for arg, following in zip(args, [*args[1:], "--"], strict=True):
        if (
            re.fullmatch(r"--(?:data|model|trainer)(?:\.\w+)+", arg)
            and not arg.endswith(".help")
            and following.startswith("--")
        ):
            raise UserError(f"The setting {arg} needs a value; give one after it.")


def _check_configs(args: list[str]) -> None:
    """Name the config that holds no settings, which the parser does not, and the setting that stands before its class."""
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        path = Path(value if equals else "".join(args[i + 1 : i + 2]))
        if name == "--config" and path.is_file():
            _check_config(path)
    names = [arg.partition("=")[0] for arg in args]
    early = next(
        (i for i, name in enumerate(names) if name.startswith("--model.") and name != "--model.help"), len(names)
    )
    if not {"--config", "--model"} & {*names[:early]} and {"--config", "--model"} & {*names[early:]}:
        raise UserError(f"{names[early]} stands before the --config or --model that it changes; put these first.")


def _check_config(path: Path) -> None:
    """Refuse a file that is no mapping of settings, or whose nesting or aliases would keep the parser busy."""
    import yaml

    advice = "correct it or give another"
    depth = deepest = aliases = 0
    try:
        text = path.read_bytes().decode("utf-8-sig")
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            deepest, aliases = max(deepest, depth), aliases + isinstance(event, yaml.AliasEvent)
            if deepest > MOST_NESTED or aliases > MOST_ALIASES:
                raise UserError(
                    f"The config {path} has more than {MOST_NESTED} levels or {MOST_ALIASES} aliases; write it without them."
                )
        settings = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise UserError(f"The config {path} is not UTF-8 text; save it as UTF-8.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"The config {path} is no YAML{place}; {advice}.") from error
    if settings is None:
        raise UserError(f"The config {path} is empty; {advice}.")
    if not isinstance(settings, dict):
        raise UserError(
            f"The config {path} is a {type(settings).__name__} where settings by name are needed; {advice}."
        )
    for part in ("model", "data"):
        given = settings.get(part)
        if isinstance(given, dict) and given.get("init_args", {}) is None:
            raise UserError(f"{part}.init_args in the config {path} is empty; give settings or leave the line out.")


def _with_run_config(args: list[str]) -> tuple[Path | None, list[str]]:
    """Takes --run out; for the commands that look at a finished run, puts its saved settings first."""
    run = None
    for i, arg in enumerate(args):
        if arg == "--run" or arg.startswith("--run="):
            taken = 1 if "=" in arg else 2
            if taken == 2 and i + 1 == len(args):
                raise UserError("--run needs the run's folder, for example --run runs/mine.")
            named = arg.split("=", 1)[1] if taken == 1 else args[i + 1]
            if not named.strip():
                raise UserError("--run must name a folder, got an empty text; give for example --run runs/mine.")
            run = Path(named)
            args = args[:i] + args[i + taken :]
            break
    if args[0] in ("fit", "show-space", "check", "dry-run") or "--help" in args or "-h" in args:
        return run, args
    looked_at = _first_to_mix(args) or run  # a mix has a folder of its own
    if looked_at is None:
        raise UserError(f"The command {args[0]!r} needs the run to look at: train.py {args[0]} --run runs/NAME.")
    folder = RunFolder(looked_at)
    folder.saved.check()
    saved = ["--config", str(folder.config)]
    with suppress(
        LookupError, TypeError, ValueError, AttributeError, YAMLError
    ):  # the parser names what is wrong with the file
        moved = folder.saved.moved()
        saved += ["--config", json.dumps(moved)] if moved else []
    return run, [args[0], *saved, *args[1:]]


def _first_to_mix(args: list[str]) -> Path | None:
    """The first of the two runs that are mixed."""
    place = next((i for i, arg in enumerate(args) if arg.partition("=")[0] == "--mix"), None)
    if place is None:
        return None
    runs = [arg for arg in args[place + 1 : place + 3] if not arg.startswith("--")]
    if args[place] != "--mix" or len(runs) != 2:
        raise UserError("--mix needs the folders of two runs, for example --mix runs/fox runs/ball.")
    return Path(runs[0])

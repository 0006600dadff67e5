"""The entry point of the command line: what needs no import of Lightning, and the exit codes.

The exit code is 0 for success, 1 for a bug or a failed `check`, 2 for a user's mistake, 130 after Ctrl-C and 143 after
SIGTERM.
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

from lightning_prompts.commands.descriptions import COMMANDS, OVERVIEW
from lightning_prompts.errors import UserError
from lightning_prompts.launchers import Launched
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.terminal import close, prepare, say

OS_ERROR_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space, and continue a search with --run and --ckpt_path last"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "permit writing there, or give another folder"),
}
MAX_NESTING, MAX_ALIASES = 50, 10  # of a config file


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; print errors of the user as one sentence, and exit.

    Args:
        args: The command line; None for that of the process.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        say(*OVERVIEW.splitlines())  # without importing Lightning, which takes seconds
        return None
    _set_up_output()
    run = None
    try:
        _check_order(args)
        if args[0] == "prefetch":
            from lightning_prompts.commands.prefetch import prefetch

            return prefetch(args[1:])
        _check_missing_values(args)
        run, args = _with_run_config(args)
        _check_configs(args)
        if "--help" not in args and "-h" not in args:
            Launched.detect()  # before Lightning, which fails on a rank that is not a number
        from lightning_prompts.commands.cli import run_command  # takes seconds to import

        run_command(args, run)
    except UserError as error:
        _exit_with(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("lightning_prompts"):
            raise
        _exit_with(
            f"The package {error.name!r} is not installed for {sys.executable}; activate the environment, or run pip "
            "install -e ."
        )
    except OSError as error:
        file = error.filename or (f"A file in {run}" if run else "A file")
        reason = f"{file} cannot be used ({error.strerror or error})"
        _exit_with(f"{reason}; {OS_ERROR_ADVICE.get(error.errno or 0, 'check the path and its permissions')}.")
    finally:
        close()


def _exit_with(message: str) -> NoReturn:
    """Print a user's mistake in one line and exit with 2."""
    say(f"error: {' '.join(message.split())}", stream=sys.stderr)
    sys.exit(2)


def _set_up_output() -> None:
    """Silence the libraries' warnings, and print safely, see `terminal`."""
    warnings.filterwarnings(
        "ignore", module=r"pytorch_lightning|lightning_fabric|torch|diffusers|transformers|jsonargparse|PIL"
    )
    prepare()


def _check_order(args: list[str]) -> None:
    """Refuse an unknown command, and settings before the command."""
    if args[0] in COMMANDS:
        return
    if any(command in args for command in COMMANDS):
        raise UserError(
            f"The command comes first and its settings after it, not {args[0]!r}: train.py fit --config FILE ..."
        )
    close = difflib.get_close_matches(args[0], COMMANDS, 1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    raise UserError(f"The command {args[0]!r} is unknown{hint}; use one of {', '.join(COMMANDS)}.")


def _check_missing_values(args: list[str]) -> None:
    """Name a setting without a value; the parser would name another one."""
    for arg, following in zip(args, [*args[1:], "--"], strict=True):
        if (
            re.fullmatch(r"--(?:data|model|trainer)(?:\.\w+)+", arg)
            and not arg.endswith(".help")
            and following.startswith("--")
        ):
            raise UserError(f"The setting {arg} needs a value; give one after it.")


def _check_configs(args: list[str]) -> None:
    """Name a config without settings, which the parser does not, and a setting given before its class."""
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
    """Refuse a file that is not a mapping of settings, or whose nesting or aliases would take the parser too long."""
    import yaml

    advice = "correct it or give another"
    depth = deepest = aliases = 0
    try:
        text = path.read_bytes().decode("utf-8-sig")
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            deepest, aliases = max(deepest, depth), aliases + isinstance(event, yaml.AliasEvent)
            if deepest > MAX_NESTING or aliases > MAX_ALIASES:
                raise UserError(
                    f"The config {path} has more than {MAX_NESTING} levels or {MAX_ALIASES} aliases; write it without "
                    "them."
                )
        settings = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise UserError(f"The config {path} is not UTF-8 text; save it as UTF-8.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"The config {path} is not valid YAML{place}; {advice}.") from error
    if settings is None:
        raise UserError(f"The config {path} is empty; {advice}.")
    if not isinstance(settings, dict):
        raise UserError(f"The config {path} must be a mapping of settings, got a {type(settings).__name__}; {advice}.")
    for part in ("model", "data"):
        given = settings.get(part)
        if isinstance(given, dict) and given.get("init_args", {}) is None:
            raise UserError(f"{part}.init_args in the config {path} is empty; give settings or leave the line out.")


def _with_run_config(args: list[str]) -> tuple[Path | None, list[str]]:
    """Remove --run from the arguments; for the commands on a finished run, insert its saved settings.

    Returns:
        The run's folder, if one is given, and the other arguments.
    """
    run = None
    for i, arg in enumerate(args):
        if arg == "--run" or arg.startswith("--run="):
            length = 1 if "=" in arg else 2
            if length == 2 and i + 1 == len(args):
                raise UserError("--run needs the run's folder, for example --run runs/mine.")
            name = arg.split("=", 1)[1] if length == 1 else args[i + 1]
            if not name.strip():
                raise UserError("--run must name a folder, got an empty text; give for example --run runs/mine.")
            run = Path(name)
            args = args[:i] + args[i + length :]
            break
    if args[0] in ("fit", "show-space", "check", "dry-run") or "--help" in args or "-h" in args:
        return run, args
    finished = _first_to_mix(args) or run  # with --mix, --run names the new folder
    if finished is None:
        raise UserError(f"The command {args[0]!r} needs a finished run: train.py {args[0]} --run runs/NAME.")
    folder = RunFolder(finished)
    folder.saved.check()
    saved = ["--config", str(folder.config)]
    with suppress(LookupError, TypeError, ValueError, AttributeError, YAMLError):  # the parser reports a broken file
        moved = folder.saved.moved()
        saved += ["--config", json.dumps(moved)] if moved else []
    return run, [args[0], *saved, *args[1:]]


def _first_to_mix(args: list[str]) -> Path | None:
    """Return the first of the two runs given as --mix, or None without it."""
    index = next((i for i, arg in enumerate(args) if arg.partition("=")[0] == "--mix"), None)
    if index is None:
        return None
    runs = [arg for arg in args[index + 1 : index + 3] if not arg.startswith("--")]
    if args[index] != "--mix" or len(runs) != 2:
        raise UserError("--mix needs the folders of two runs, for example --mix runs/fox runs/ball.")
    return Path(runs[0])

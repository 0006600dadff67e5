"""Prepare a checkpoint for the search that resumes it, and refuse one of another search."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_prompts.engine.batch import merge
from lightning_prompts.engine.checkpoint import checkpoints_of_all
from lightning_prompts.errors import UserError
from lightning_prompts.runs.record import Problem

if TYPE_CHECKING:
    from lightning_prompts.engine.method import PromptMethod


def prepare_checkpoint(checkpoint: dict[str, Any], method: PromptMethod) -> dict[str, Any]:
    """Adapt a checkpoint, which Lightning then restores, to the current inputs, ranks and shape of the parameter.

    If the number of ranks has changed, the open problems of all ranks are divided again.

    Args:
        checkpoint: The checkpoint of this rank, changed in place.
        method: The method that resumes it.

    Returns:
        The batch of the checkpoint.

    Raises:
        UserError: The inputs or the settings are not those of the checkpoint.
    """
    several = [checkpoint]
    if redistribute := checkpoint["batch"]["parts"] != method.data.part[1]:
        several = checkpoints_of_all(method.data.folder.checkpoints)
    records = _current_records(several, method)
    if redistribute:
        checkpoint |= merge(several, lambda record: method.data.still_open(records[record["key"]]))
    batch: dict[str, Any] = checkpoint["batch"]
    batch["records"] = [_checked_record(record, records[record["key"]], method) for record in batch["records"]]
    prompts = _checked_prompts(checkpoint["state_dict"], method)
    _check_optimizer(checkpoint["optimizer_states"], method)
    method.batch.parameter.data = torch.empty_like(prompts)
    if method.microbatch.fitted:  # as before, so that calls round alike
        method.microbatch.size = batch["microbatch"]
    return batch


def restore_batch(saved: dict[str, Any], method: PromptMethod) -> None:
    """Continue with the rows of a checkpoint, as `prepare_checkpoint` returned them."""
    method.batch.load(saved)
    method.data.resume({row.record.key: row.record.target for row in method.batch.rows if row.active})
    if len(method.batch):
        method.set_rows(method.batch.records)
    for problem in method.batch.records:
        method.data.folder.save(problem)


def _current_records(checkpoints: list[dict[str, Any]], method: PromptMethod) -> dict[str, Problem]:
    """Return the problems of checkpoints by key, with the places and names of the current inputs."""
    saved = [record for checkpoint in checkpoints for record in checkpoint["batch"]["records"]]
    records = {record["key"]: Problem(**record) for record in saved}
    method.data.find(list(records.values()))
    if gone := [problem for problem in records.values() if problem.index < 0]:
        raise UserError(
            f"The checkpoint has {len(gone)} {method.data.given[0]} that are not among {method.data.given[1]}; give "
            "the same ones and the same settings, or another --run."
        )
    return records


def _checked_record(record: dict[str, Any], current: Problem, method: PromptMethod) -> dict[str, Any]:
    """Return a saved record with the fields of the current inputs, if its result is one of the method."""
    record = asdict(Problem(**record))
    try:
        method.result_class.read(record["result"])
    except ValueError as error:
        raise UserError(
            f"The checkpoint has results that are not those of {type(method).__name__}; give the settings that "
            "the run was begun with."
        ) from error
    return record | {name: getattr(current, name) for name in ("target", "paths", "stamps", "caption", "index")}


def _checked_prompts(state_dict: dict[str, Tensor], method: PromptMethod) -> Tensor:
    """Return the saved prompts (P, ...), if the method has a parameter of their name and shape."""
    ((name, prompts),) = state_dict.items()
    (own_name,), own = method.state_dict(), method.batch.parameter.shape[1:]
    if name != own_name or (0 not in own and prompts.shape[1:] != own):
        raise UserError(
            f"The checkpoint has prompts {name!r} of the shape {tuple(prompts.shape[1:])} and this search has "
            f"{own_name!r} of {tuple(own)}; give the settings that the run was begun with."
        )
    return prompts


def _check_optimizer(states: list[dict[str, Any]], method: PromptMethod) -> None:
    """Refuse the states of a checkpoint if only one of it and the method has an optimizer."""
    has_optimizer = any(states)  # Lightning saves the state {} where there is none
    if has_optimizer != (method.configure_optimizers() is not None):
        raise UserError(
            "The checkpoint has the state of another optimizer; give the settings that the run was begun with."
        )

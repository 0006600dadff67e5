"""What L-BFGS knows of each problem's curvature, and the direction that follows from it."""

from __future__ import annotations

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows, (P, N) and (P, N) to (P,); no matrix product, which could be computed in TF32."""
    return (a * b).sum(dim=1)


def choose_rows(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Takes the rows in a mask, (P,) bool, from one tensor (P, N) and the others from another."""
    return torch.where(mask.unsqueeze(1), yes, no)


def new_state(flat: Tensor, history: int) -> dict[str, Tensor]:
    """The state of problems (P, N) of which nothing is known, each tensor with the leading axis P.

    - steps, changes: Steps s and changes of gradient y, (P, history, N), rings of which unused slots are 0.
    - rho: 1 / (y.s) of each pair, (P, history), 0 in unused slots.
    - pairs: Number of pairs ever stored, (P,).
    - scale: Of the initial inverse Hessian, (P,).
    - n_iter: Iterations since the history was empty, (P,).
    - prev_grad: Gradient where the last iteration began, (P, N).
    - move: The change of the point that the last iteration made, (P, N).
    - point: The last point that was evaluated and accepted, (P, N).
    """
    state = {name: flat.new_zeros(len(flat), history, flat.shape[1]) for name in ("steps", "changes")}
    for name in ("prev_grad", "move", "point"):
        state[name] = torch.zeros_like(flat, memory_format=torch.contiguous_format)
    state["rho"] = flat.new_zeros(len(flat), history)
    state["scale"] = flat.new_ones(len(flat))
    for name in ("n_iter", "pairs"):
        state[name] = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
    return state


def remember(state: dict[str, Tensor], mask: Tensor, change: Tensor, step: Tensor, curvature_eps: float) -> None:
    """Stores the curvature pairs of some problems over their oldest ones.

    Args:
        state: See `new_state`.
        mask: The problems, (P,) bool.
        change: Changes of the gradient y, (P, N).
        step: Steps s that made them, (P, N); 0 where there was none.
        curvature_eps: A pair is skipped unless y.s is larger.
    """
    curvature = dot(change, step)
    mask = mask & (curvature > curvature_eps)
    row = torch.arange(len(mask), device=mask.device)
    slot = state["pairs"] % state["rho"].shape[1]
    for name, value in (("changes", change), ("steps", step)):
        state[name][row, slot] = choose_rows(mask, value, state[name][row, slot])
    state["rho"][row, slot] = torch.where(mask, 1 / curvature, state["rho"][row, slot])
    state["scale"] = torch.where(mask, curvature / dot(change, change), state["scale"])
    state["pairs"] += mask


def newton_direction(state: dict[str, Tensor], grad: Tensor) -> Tensor:
    """Minus the inverse Hessian's estimate times the gradients, (P, N), by the two-loop recursion.

    Unused slots are 0 and change nothing, so problems with fewer pairs need no mask.
    """
    history = state["rho"].shape[1]
    row = torch.arange(len(grad), device=grad.device)
    depth = min(history, int(state["pairs"].max()))
    slots = [(state["pairs"] - age) % history for age in range(1, depth + 1)]  # from the newest pair to the oldest
    alphas = []
    vector = -grad
    for slot in slots:
        alphas.append(dot(state["steps"][row, slot], vector) * state["rho"][row, slot])
        vector = vector - alphas[-1].unsqueeze(1) * state["changes"][row, slot]
    vector = vector * state["scale"].unsqueeze(1)
    for slot, alpha in zip(reversed(slots), reversed(alphas), strict=True):
        beta = dot(state["changes"][row, slot], vector) * state["rho"][row, slot]
        vector = vector + (alpha - beta).unsqueeze(1) * state["steps"][row, slot]
    return vector

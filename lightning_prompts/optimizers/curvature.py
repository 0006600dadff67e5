"""The curvature history of L-BFGS for independent problems, and the quasi-Newton direction."""

from __future__ import annotations

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products (P,) of rows (P, N) and (P, N); no matmul, which could run in TF32."""
    return (a * b).sum(dim=1)


def choose_rows(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Take the rows in a mask, (P,) bool, from `yes` (P, N) and the others from `no` (P, N)."""
    return torch.where(mask.unsqueeze(1), yes, no)


def new_state(flat: Tensor, history: int) -> dict[str, Tensor]:
    """Return the state of problems (P, N) with an empty history; all tensors are 0 and have the leading axis P.

    - steps, changes: Steps s and gradient changes y, (P, history, N), ring buffers with zeros in unused slots.
    - rho: 1 / (y.s) of each pair, (P, history), 0 in unused slots.
    - pairs: Number of pairs stored so far, (P,).
    - scale: Scale of the initial inverse Hessian, (P,), which is 1 as long as there are no pairs.
    - n_iter: Iterations since the history was empty, (P,).
    - prev_grad: Gradient at the start of the last iteration, (P, N).
    - move: Change of the point in the last iteration, (P, N).
    - point: Last accepted point, (P, N).
    """
    state = {name: flat.new_zeros(len(flat), history, flat.shape[1]) for name in ("steps", "changes")}
    for name in ("prev_grad", "move", "point"):
        state[name] = torch.zeros_like(flat, memory_format=torch.contiguous_format)
    state["rho"] = flat.new_zeros(len(flat), history)
    state["scale"] = flat.new_zeros(len(flat))
    for name in ("n_iter", "pairs"):
        state[name] = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
    return state


def store_pairs(state: dict[str, Tensor], mask: Tensor, change: Tensor, step: Tensor, curvature_eps: float) -> None:
    """Store the curvature pairs of some problems in place of their oldest ones.

    Args:
        state: The state; see `new_state`.
        mask: The problems, (P,) bool.
        change: Gradient changes y, (P, N).
        step: Steps s, (P, N); 0 where there was none.
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
    """Compute minus the estimated inverse Hessian times the gradients, (P, N), with the two-loop recursion.

    Unused slots are 0 and have no effect, so problems with fewer pairs need no mask.
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
    vector = vector * torch.where(state["pairs"] > 0, state["scale"], 1).unsqueeze(1)
    for slot, alpha in zip(reversed(slots), reversed(alphas), strict=True):
        beta = dot(state["changes"][row, slot], vector) * state["rho"][row, slot]
        vector = vector + (alpha - beta).unsqueeze(1) * state["steps"][row, slot]
    return vector

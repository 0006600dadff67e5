"""The parameters of steering methods alone: which rows move, where they start, and what they become."""

import pytest
import torch

from lightning_prompts.embeddings import slerp
from lightning_prompts.methods.steering.parameters import PromptArc, PromptEmbeds

MOVING = torch.tensor([False, True, True, True, True, False])


def create_prompt(one_row=False, problems=3):
    """Return the parameters of problems with two encoded prompts each.

    Their padding of zeros begins at different rows.
    """
    embeds = torch.randn(problems, 2, 6, 4)
    embeds[0, 0, 4:] = 0
    embeds[1, 1, 2:] = 0
    embeds[1, 0, 4, 1:] = 0  # a row that is not padding, although most of its numbers are zeros
    prompt = PromptEmbeds(lambda embeds: MOVING, one_row)
    prompt.set_initial(embeds)
    prompt.rows.data = prompt.init_params(embeds)
    return prompt, embeds


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1]])
def test_only_searchable_rows_are_replaced(rows):
    prompt, embeds = create_prompt()
    assert torch.equal(prompt(torch.tensor(rows)), embeds[rows])
    moved = prompt.rows.data + torch.arange(1.0, 4).view(3, 1, 1, 1)
    prompt.rows.data = moved
    result = prompt(torch.tensor(rows))
    assert torch.equal(result[:, :, MOVING], moved[rows])
    assert torch.equal(result[:, :, ~MOVING], embeds[rows][:, :, ~MOVING])


def test_one_row_starts_at_the_last_row_before_the_padding():
    prompt, embeds = create_prompt(one_row=True)
    last = torch.tensor([[3, 4], [4, 1], [4, 4]])
    expected = torch.stack([torch.stack([embeds[p, s, last[p, s]] for s in range(2)]) for p in range(3)])
    assert torch.equal(prompt.rows[:, :, 0], expected)
    result = prompt(torch.tensor([1, 0]))
    assert torch.equal(result[:, :, MOVING], expected[[1, 0]].unsqueeze(2).expand(-1, -1, 4, -1))
    assert torch.equal(result[:, :, ~MOVING], embeds[[1, 0]][:, :, ~MOVING])


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_is_finite_names_problems_with_nonfinite_parameters(wrong):
    prompt, _ = create_prompt()
    prompt.rows.data[1, 1, 2, 3] = wrong
    assert prompt.is_finite().tolist() == [True, False, True]
    arc = PromptArc()
    arc.place.data = torch.tensor([0.0, wrong, 1e9]).view(3, 1, 1, 1)
    assert arc.is_finite().tolist() == [True, False, True]


def test_arc_goes_from_the_prompt_to_the_other():
    initial, other = torch.randn(3, 1, 5, 4), torch.randn(1, 1, 5, 4)
    arc = PromptArc(initial_logit=-3.0)
    arc.set_initial(initial)
    arc.other = other
    arc.place.data = arc.init_params(initial)
    start = slerp(initial, other.expand_as(initial), 1 / (1 + torch.tensor(3.0).exp()))
    torch.testing.assert_close(arc(torch.arange(3)), start)
    arc.place.data = torch.tensor([-40.0, 0.0, 40.0]).view(3, 1, 1, 1)
    expected = torch.cat([initial[:1], slerp(initial[1:2], other, 0.5), other])
    torch.testing.assert_close(arc(torch.arange(3)), expected)
    torch.testing.assert_close(arc(torch.tensor([2, 0])), expected[[2, 0]])

import io
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lightning_prompts.callbacks.image_writer import file_name
from lightning_prompts.commands.evolution import Member
from lightning_prompts.commands.mix import ask, joint_similarity
from lightning_prompts.sampling.figures import sheet

SOME = [Member(i, f"prompt {i}", (i,), score=i / 10) for i in (3, 5, 8)]


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("8 3\n", [8, 3]),
        ("3,5\n", [3, 5]),
        ("5 5, 5\n", [5]),
        ("\n", [8, 5]),  # the selection by score
        ("4\n-3\nthree\n3 99\n3.0\n²\n 3 \n", [3]),
    ],
)
def test_user_selects_prompts_by_number(monkeypatch, capsys, typed, kept):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert [member.index for member in ask(Path("generation-0.png"), SOME, [SOME[2], SOME[1]])] == kept
    output = capsys.readouterr().out
    assert output.count("generation-0.png") == typed.count("\n")
    assert output.count("such as 8 5") == typed.count("\n") - 1


def test_end_of_input_raises_eof_error(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("no\n"))
    with pytest.raises(EOFError):
        ask(Path("generation-0.png"), SOME, SOME[:1])


class Pixels:
    """Stand in for a CLIP, with pixels as features."""

    def features(self, images):
        return F.normalize(images.flatten(1), dim=1)


def test_joint_similarity_needs_both_targets_in_one_image():
    one, other = (torch.eye(12)[i].view(1, 3, 2, 2) for i in (0, 1))
    mixed = one + other
    either, score = joint_similarity(Pixels(), torch.cat([one, other]), [one, other])
    assert either == pytest.approx((0.5, 0.5))
    assert score == pytest.approx(0.0)
    assert joint_similarity(Pixels(), torch.cat([one, one]), [one, other]) == (
        pytest.approx((1.0, 0.0)),
        pytest.approx(0.0),
    )
    assert joint_similarity(Pixels(), mixed, [one, other]) == (
        pytest.approx((0.5**0.5, 0.5**0.5)),
        pytest.approx(0.5**0.5),
    )
    assert joint_similarity(Pixels(), one, [torch.cat([one, other]), one])[1] == pytest.approx(
        0.5
    )  # the mean over several images


def test_sheet_wraps_at_its_width():
    image = torch.zeros(3, 16, 16)
    wide, narrow = (sheet([[image]] * 5, ["word"] * 5, across, side=20) for across in (5, 2))
    assert wide.width == 5 * 28
    assert (narrow.width, narrow.height) == (2 * 28, 3 * wide.height)


def test_file_names_of_different_texts_differ():
    texts = ["a fox", "A fox", "a fox!", "狐狸", "球", "x" * 300, "x" * 301, "../up"]
    names = {file_name(text) for text in texts}
    assert len(names) == len(texts)
    for name in names:
        assert len(name) <= 45
        assert name.replace("-", "").isalnum()

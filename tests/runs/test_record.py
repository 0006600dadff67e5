import math

import pytest

from lightning_prompts.runs.record import Problem

KEY = f"{1:016x}"


def test_unknown_status_is_refused():
    with pytest.raises(ValueError, match=r"'not_improved' is unknown; use one of .*'not improved'"):
        Problem(KEY, "x", status="not_improved")


@pytest.mark.parametrize(
    ("loss", "initial", "status", "reason"),
    [
        (0.4, 0.5, "done", None),
        (0.5, 0.5, "not improved", "0.5 is no lower than the initial one's 0.5"),
        (0.6, 0.5, "not improved", "0.6 is no lower than"),
        (None, 0.5, "failed", "No prompt was found whose text encodes to the same tokens"),
        (None, math.nan, "failed", "not a finite number from the start"),
        (math.nan, 0.5, "failed", "not a finite number"),
        (math.inf, None, "failed", "not a finite number"),
        (0.4, math.nan, "done", None),
        (0.0, None, "done", None),
        (None, None, "done", None),
    ],
)
def test_finish_compares_the_losses(loss, initial, status, reason):
    problem = Problem(KEY, "x", validation_loss=loss, initial_validation_loss=initial, reason="stale")
    problem.finish()
    assert problem.status == status
    assert problem.reason is None if reason is None else reason in problem.reason


def test_finish_does_not_change_a_failed_problem():
    problem = Problem(KEY, "x", status="failed", reason="It is empty.", validation_loss=0.1)
    problem.finish()
    assert (problem.status, problem.reason) == ("failed", "It is empty.")

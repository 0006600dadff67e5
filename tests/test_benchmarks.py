"""The tables in the docs are those that the committed figures give."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def comparison(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import comparison

    return comparison


@pytest.mark.parametrize("targets", ["evaluation", "outside"])
def test_comparison_in_the_docs_is_that_of_the_figures(targets, comparison):
    page, results = (ROOT / "docs" / "comparison.md").read_text(), comparison.measured(targets)
    assert comparison.table(results, comparison.words_of(targets)) in page
    assert comparison.differences(results) in page


@pytest.mark.parametrize("targets", ["evaluation", "outside"])
def test_each_method_is_measured_on_each_target_at_each_budget(targets, comparison):
    results = comparison.measured(targets)
    for rows in results.values():
        assert sorted(row["target"] for row in rows) == sorted(comparison.words_of(targets))
    for method in {name for name, _ in results}:
        # The words of the CLIP spend next to nothing, a caption nothing.
        budgets = comparison.BUDGETS if method not in ("CLIP words", comparison.CAPTION) else comparison.BUDGETS[-1:]
        assert [budget for name, budget in results if name == method] == list(budgets)

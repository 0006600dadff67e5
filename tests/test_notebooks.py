"""Every notebook runs from top to bottom."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

SHORTER = {  # replacements that shorten the searches of a notebook
    "metric_guidance": ('"fit", *config', '"fit", *config, "--model.steps", "5"'),
    "seed_invariance": ('"30"', '"6"'),
    "evolve_and_remove": ('"90"', '"10"'),
    "better_prompts": ('"12"', '"4"'),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_prints_its_results(path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells if path.stem in SHORTER else ():
        cell.source = cell.source.replace(*SHORTER[path.stem])
    assert path.stem not in SHORTER or SHORTER[path.stem][1] in "".join(cell.source for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(path.parent)}}).execute()
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "similarity" in printed
    assert "Results are in" in printed

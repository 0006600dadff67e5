"""The tables in the docs match the committed figures."""

from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("benchmarks")


@pytest.fixture
def comparison():
    import comparison

    return comparison


def test_word_search_table_in_the_docs_equals_the_figures():
    import word_search

    page, (regrets, _) = (ROOT / "docs" / "dpo_diff.md").read_text(), word_search.regrets()
    assert word_search.tables_of(regrets) in page
    repetitions = {len(values) for of in regrets.values() for values in of.values()}
    assert list(regrets) == word_search.lines()
    assert ({len(of) for of in regrets.values()}, repetitions) == ({20}, {5})


def test_check_table_in_the_docs_equals_the_figures():
    import check

    rows = check.tables.read(check.FIGURES)
    targets = {name: [row["target"] for row in rows if row["config"] == name] for name in ("ph2p.yaml", "suggested")}
    assert sorted(targets["ph2p.yaml"]) == sorted(targets["suggested"]) == sorted(check.words_of("development"))
    assert check.table() in (ROOT / "docs" / "check.md").read_text()


@pytest.mark.parametrize("targets", ["evaluation", "outside"])
def test_comparison_tables_in_the_docs_equal_the_figures(targets, comparison):
    page, results = (ROOT / "docs" / "comparison.md").read_text(), comparison.measured(targets)
    assert comparison.table(results, comparison.words_of(targets)) in page
    assert comparison.differences(results) in page


@pytest.mark.parametrize("targets", ["evaluation", "outside"])
def test_each_method_is_measured_on_each_target_at_each_budget(targets, comparison):
    results = comparison.measured(targets)
    for rows in results.values():
        assert sorted(row["target"] for row in rows) == sorted(comparison.words_of(targets))
    for method in {name for name, _ in results}:
        # CLIP words need almost no samples, a caption none.
        budgets = comparison.BUDGETS if method not in (*comparison.FEW, comparison.CAPTION) else comparison.BUDGETS[-1:]
        assert [budget for name, budget in results if name == method] == list(budgets)


@pytest.mark.parametrize("task", ["improve", "attack"])
def test_better_prompts_table_in_the_docs_equals_the_figures(task):
    import better_prompts

    assert better_prompts.table(task, 100) in (ROOT / "docs" / "dpo_diff.md").read_text()
    files = list((better_prompts.FIGURES / f"{task}_100").glob("*.csv"))
    assert files
    for file in files:
        assert len(file.read_text().splitlines()) == 101


def test_metric_guidance_table_in_the_docs_equals_the_figures():
    import metric_guidance

    assert metric_guidance.table() in (ROOT / "docs" / "metric_guidance.md").read_text()
    for line in metric_guidance.LINES:
        prompts = [row["prompt"] for row in metric_guidance.rows_of(line)]
        assert prompts == [prompt for prompt, _ in metric_guidance.captions(metric_guidance.SEED, 50)]


@pytest.mark.parametrize("targets", ["outside", "evaluation"])
def test_human_feedback_table_in_the_docs_equals_the_figures(targets):
    import human_feedback

    rows = human_feedback.rows_of(targets)
    assert human_feedback.table(rows) in (ROOT / "docs" / "human_feedback.md").read_text()
    assert [row["image"] for row in rows] == [file.name for _, file in human_feedback.tasks(targets)]


def test_reuse_table_in_the_docs_equals_the_figures():
    import reuse
    import tables

    rows = tables.read(reuse.FIGURES)
    assert reuse.table(rows) in (ROOT / "docs" / "metric_guidance.md").read_text()
    assert all(row["prompt"] != row["learned_on"] for row in rows)


def test_seed_invariance_table_in_the_docs_equals_the_figures():
    import seed_invariance

    assert seed_invariance.table() in (ROOT / "docs" / "seed_invariance.md").read_text()
    prompts = [prompt for prompt, _ in seed_invariance.captions(seed_invariance.SEED, seed_invariance.CAPTIONS)]
    for line in seed_invariance.LINES:
        rows = seed_invariance.rows_of(line)
        assert list(dict.fromkeys(row["prompt"] for row in rows)) == prompts[: len(rows) // seed_invariance.TARGETS]


@pytest.mark.parametrize("part", ["throughput", "share", "profile", "settings"])
def test_speed_tables_in_the_docs_equal_the_figures(part):
    import speed
    import tables

    table = speed.PARTS[part][1]
    assert table(tables.read(speed.figures(part))) in (ROOT / "docs" / "speed.md").read_text()


def test_speed_figures_meet_the_targets():
    import speed
    import tables

    ratios = {row["method"]: row["ratio"] for row in tables.read(speed.figures("throughput")) if row["targets"] == 16}
    assert set(ratios) == set(speed.HOW)
    assert min(ratios.values()) >= 3
    steps = [row for row in tables.read(speed.figures("share")) if row["what"].endswith("targets")]
    assert min(row["share_of_best"] for row in steps) >= 0.3


@pytest.mark.parametrize("what", ["scaling", "processes"])
def test_large_job_tables_in_the_docs_equal_the_figures(what):
    import large_jobs
    import tables

    rows = tables.read(large_jobs.FIGURES[what])
    assert large_jobs.TABLES[what](rows) in (ROOT / "docs" / "large_jobs.md").read_text()


def test_second_process_speeds_up_the_search():
    import large_jobs
    import tables

    search = {
        count: median(
            row["search"] for row in tables.read(large_jobs.FIGURES["processes"]) if row["processes"] == count
        )
        for count in (1, 2)
    }
    assert search[1] / search[2] >= 1.8


@pytest.mark.parametrize("name", ["interruptions", "two_machines"])
def test_interruption_tables_in_the_docs_equal_the_figures(name):
    import tables

    benchmark = __import__(name)
    assert benchmark.table(tables.read(benchmark.FIGURES)) in (ROOT / "docs" / "large_jobs.md").read_text()


def test_agreement_table_in_the_docs_equals_the_figures():
    import pipelines
    import tables

    rows = tables.read(pipelines.FIGURES)
    assert pipelines.table(rows) in (ROOT / "docs" / "models.md").read_text()
    assert max(row["difference"] for row in rows) < 1e-4
    assert min(row["between_prompts"] for row in rows) > 100 * max(row["difference"] for row in rows)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "schedulers"),
    [
        ("sd1", ["PNDMScheduler", "EulerAncestralDiscreteScheduler", "TCDScheduler"]),
        ("sdxl", ["DDIMScheduler"]),
        ("playground", None),
        ("sd3", None),
        ("flux", None),
        ("pixart", ["UniPCMultistepScheduler"]),
    ],
)
def test_images_agree_with_those_of_pipelines(family, schedulers, tmp_path):
    import families
    import pipelines

    rows = pipelines.compare(family, families.save(family, tmp_path), 16, schedulers)
    assert {(row["guidance"], row["prompt"]) for row in rows} == {(g, p) for g in (1.0, 5.0) for p in ("short", "long")}
    assert max(row["difference"] for row in rows) < 1e-4

import textwrap

import pytest

from benchmarks.house import LIMITS, figures, main, parsed


@pytest.fixture(scope="module")
def measured():
    return figures()


@pytest.mark.parametrize("name", LIMITS)
def test_package_keeps_its_limits(measured, name):
    assert measured[name].value <= measured[name].most, "\n".join([name, *measured[name].excess])


def package(folder, files):
    """Write a package that is within all limits, but for some files."""
    for path, text in {"errors.py": "def one():\n    return 1\n\n\ndef two():\n    return 2\n", **files}.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(textwrap.dedent(text))
    return figures(parsed(folder))


UPWARD = "from lightning_prompts.engine.batch import Batch\n"


@pytest.mark.parametrize(
    ("name", "text", "excess"),
    [
        ("upward imports", UPWARD, ["data/a.py imports engine"]),
        ("upward imports", f"def f():\n    {UPWARD}", ["data/a.py imports engine"]),
        ("upward imports", "import lightning_prompts.engine.batch", ["data/a.py imports engine"]),
        ("upward imports", "from lightning_prompts import engine", ["data/a.py imports engine"]),
        ("upward imports", "from lightning_prompts import __version__", ["data/a.py imports __init__"]),
        ("upward imports", f"if TYPE_CHECKING:\n    {UPWARD}", []),
        ("upward imports", "from lightning_prompts.errors import UserError", []),
        ("upward imports", "from lightning_prompts.data.b import c", []),
        ("`Any` on the seams", "def f(module: Any): ...", ["data/a.py:1: module is Any"]),
        ("`Any` on the seams", "class A:\n    batch: Any | None", ["data/a.py:2: batch is Any"]),
        ("`Any` on the seams", "def f(self):\n    self.data: Any = 1", ["data/a.py:2: data is Any"]),
        ("`Any` on the seams", "def f(data: dict[str, Any], other: Any): ...", []),
        ("docstrings of fewer than four words", '"""Too short this."""', ["data/a.py: 'Too short this.'"]),
        ("docstrings of fewer than four words", '"""Not too short this."""', []),
        ("lines over the declared length", f"x = '{114 * 'x'}'", []),
        ("lines over the declared length", f"x = '{115 * 'x'}'", ["data/a.py:1 has 121 characters"]),
        ("largest class, lines", "class A:\n" + 259 * "    x = 1\n", []),
        ("largest class, lines", "class A:\n" + 260 * "    x = 1\n", ["data/a.py: A has 261"]),
        ("largest file, lines", 401 * "x = 1\n", ["data/a.py has 401"]),
        ("function p90, lines", 20 * ("def f():\n" + 99 * "    x = 1\n"), ["the tenth of the functions has 100"]),
    ],
)
def test_what_exceeds_a_limit_is_named(tmp_path, name, text, excess):
    figure = package(tmp_path, {"data/a.py": text})[name]
    assert figure.excess == excess
    assert (figure.value > figure.most) == bool(excess)


def test_import_cycle_through_a_third_package_is_named(tmp_path):
    line = "from lightning_prompts.{}.x import y"
    files = {
        f"{one}/a.py": line.format(other) for one, other in (("data", "runs"), ("runs", "cache"), ("cache", "data"))
    }
    assert package(tmp_path, files)["import cycles between packages"].value == 3


def test_layers_have_every_module(tmp_path):
    with pytest.raises(ValueError, match="LAYERS lacks other"):
        package(tmp_path, {"other.py": ""})


def test_exit_status_says_whether_a_limit_is_exceeded(monkeypatch, capsys):
    for most, status in ((10**6, 0), (1, 1)):
        monkeypatch.setattr("benchmarks.house.LIMITS", dict.fromkeys(LIMITS, most))
        assert main() == status
    assert "engine/method.py: PromptMethod has" in capsys.readouterr().out

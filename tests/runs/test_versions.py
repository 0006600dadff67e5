import sys
from importlib.metadata import version

from lightning_prompts.runs import reports
from lightning_prompts.runs.reports import versions


def test_versions_name_the_packages_that_affect_results():
    result = versions()
    assert set(result) == {"python", *reports._PACKAGES}
    assert set(reports._PACKAGES) == {"lightning_prompts", "torch", "diffusers", "transformers", "pytorch_lightning"}
    assert result["python"] == "{}.{}.{}".format(*sys.version_info[:3])
    assert result["torch"] == version("torch")


def test_missing_package_is_listed_as_not_installed(monkeypatch):
    monkeypatch.setattr(reports, "_PACKAGES", ("no-such-package",))
    assert versions()["no-such-package"] == "not installed"


def test_versions_are_read_without_imports(monkeypatch):
    for package in reports._PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)  # makes its import fail
    assert versions()["torch"] == version("torch")

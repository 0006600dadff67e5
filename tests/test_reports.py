import sys
from importlib.metadata import version

from lightning_prompts.runs import reports
from lightning_prompts.runs.reports import versions


def test_versions_name_the_packages_that_decide_a_result():
    found = versions()
    assert set(found) == {"python", *reports._PACKAGES}
    assert set(reports._PACKAGES) == {"lightning_prompts", "torch", "diffusers", "transformers", "pytorch_lightning"}
    assert found["python"] == "{}.{}.{}".format(*sys.version_info[:3])
    assert found["torch"] == version("torch")


def test_a_package_that_is_not_installed_is_said_to_be_so(monkeypatch):
    monkeypatch.setattr(reports, "_PACKAGES", ("no-such-package",))
    assert versions()["no-such-package"] == "not installed"


def test_versions_import_nothing(monkeypatch):
    for package in reports._PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)  # makes its import fail
    assert versions()["torch"] == version("torch")

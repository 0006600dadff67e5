"""Unknown settings are answered with those that were probably meant."""

import pytest

from lightning_prompts.methods import GCG, PEZ, DPODiff, HumanFeedback, MetricGuidance, SeedInvariance
from lightning_prompts.parser_errors import similar_settings
from lightning_prompts.text_settings import all_settings, with_groups


@pytest.mark.parametrize("kind", [GCG, PEZ, DPODiff, MetricGuidance, SeedInvariance, HumanFeedback])
def test_setting_without_its_group_gets_a_hint(kind):
    known = dict(with_groups(all_settings(kind)))
    grouped = [setting for setting in known if "." in setting]
    assert {"backbone.dtype", "sampler.guidance_scale"} <= {*grouped}
    for setting in grouped:
        name = setting.partition(".")[2]
        similar = similar_settings(name, known)
        assert setting in similar
        assert {each.rpartition(".")[2] for each in similar} == {name}


@pytest.mark.parametrize(
    ("unknown", "similar"),
    [
        ("step", ["steps"]),
        ("dtype", ["backbone.dtype"]),
        ("sampler.dtype", ["backbone.dtype"]),
        ("weight", ["first.weight", "second.weight"]),
        ("first.wait", ["first.weight"]),
        ("dtyp", ["backbone.dtype"]),
        ("wieght", ["first.weight", "second.weight"]),
        ("xyz", []),
    ],
)
def test_similar_settings_have_the_name_or_a_close_one(unknown, similar):
    known = ["second.weight", "first.weight", "steps", "backbone.dtype"]
    assert similar_settings(unknown, known) == similar

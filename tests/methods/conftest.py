"""Models of every family, shared by the tests of a file."""

import families
import pytest


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the families' folders, written on first use; text after a comma is not part of a family's name."""
    result = {}

    def folder(family):
        family = family.partition(",")[0]
        if family not in result:
            result[family] = families.save_with_clip(family, tmp_path_factory.mktemp(family))
        return result[family]

    return folder

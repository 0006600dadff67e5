"""Models of every family, shared by a file's tests."""

import families
import pytest


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The families' folders, written when they are first asked for; what follows a comma is not part of a family's name."""
    found = {}

    def folder(family):
        family = family.partition(",")[0]
        if family not in found:
            found[family] = families.save_with_clip(family, tmp_path_factory.mktemp(family))
        return found[family]

    return folder

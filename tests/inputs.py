"""Images of noise, and an assertion about the message that refuses an input."""

import numpy as np
import pytest
from PIL import Image

from lightning_prompts.errors import UserError


def noise(width=16, height=16, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def assert_refused(match, function, *args, **kwargs):
    """Assert that a function raises a UserError of one sentence that contains `match`."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert match in message
    assert message.endswith(".")
    assert ". " not in message
    assert "\n" not in message

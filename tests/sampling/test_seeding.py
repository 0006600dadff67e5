"""The draws equal those of their formulas, written out here."""

import hashlib

import pytest
import torch

from lightning_prompts.sampling.seeding import derive_seed, draw_noise, draw_timesteps, validation_timesteps

KEYS = [f"key{i}" for i in range(300)]


def test_seed_is_63_bits_of_a_hash_of_the_address():
    digest = hashlib.blake2b(b"5/key/-3/2", digest_size=8).digest()
    assert derive_seed(5, "key", -3, 2) == sum(byte << (8 * (7 - i)) for i, byte in enumerate(digest)) // 2


@pytest.mark.parametrize("steps", [4, [4, -1, 9]])
def test_noise_is_drawn_by_the_address_of_each_sample(steps):
    noise = draw_noise(5, KEYS[:3], steps, 2, (4, 3), "cpu")
    for p, key in enumerate(KEYS[:3]):
        step = steps if isinstance(steps, int) else steps[p]
        for k in range(2):
            draw = torch.Generator().manual_seed(derive_seed(5, key, step, k))
            assert torch.equal(noise[p, k], torch.randn(4, 3, generator=draw))


@pytest.mark.parametrize(("low", "high"), [(0, 1000), (500, 1000), (300, 340)])
def test_each_sample_has_a_timestep_in_its_part_of_the_range(low, high):
    timesteps = draw_timesteps(5, KEYS, 4, 4, low, high)
    part = (high - low) / 4
    for k, column in enumerate(timesteps.T):
        begin = low + k * part
        assert begin <= int(column.min()) < begin + 0.1 * part + 1
        assert begin + 0.9 * part - 1 < int(column.max()) < begin + part
        assert float(column.double().mean()) == pytest.approx(begin + part / 2, abs=0.07 * part + 0.5)
    steps = [i % 7 - 1 for i in range(len(KEYS))]
    alone = [draw_timesteps(5, [key], step, 4, low, high) for key, step in zip(KEYS, steps, strict=True)]
    assert torch.equal(draw_timesteps(5, KEYS, steps, 4, low, high), torch.cat(alone))


@pytest.mark.parametrize(
    ("samples", "low", "high", "expected"),
    [(4, 0, 1000, [125, 375, 625, 875]), (3, 500, 1000, [583, 750, 916]), (1, 3, 8, [5]), (2, 250, 750, [375, 625])],
)
def test_validation_timesteps_are_in_the_middle_of_equal_parts(samples, low, high, expected):
    assert validation_timesteps(samples, low, high).tolist() == expected

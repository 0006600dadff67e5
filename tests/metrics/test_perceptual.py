"""LPIPS on random trunks equals its definition, and nothing is downloaded."""

from pathlib import Path

import lpips
import pytest
import torch
import torchvision

from lightning_prompts.errors import UserError
from lightning_prompts.metrics import Lpips, missing_lpips_weights
from lightning_prompts.metrics.perceptual import TRUNKS

RELUS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}  # of torchvision's `features`
NETWORKS = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}


@pytest.fixture(scope="module")
def trunks(tmp_path_factory):
    """Create random layers of the two networks, and files of them in the format of torchvision."""
    made = {}
    for trunk, network in NETWORKS.items():
        with torch.device("meta"):  # without the large layers, which LPIPS does not use
            features = network(weights=None).features
        features.to_empty(device="cpu")
        for name, parameter in features.named_parameters():
            torch.nn.init.normal_(parameter, std=0.01 if "bias" in name else (2 / parameter[0].numel()) ** 0.5)
        file = tmp_path_factory.mktemp(trunk) / TRUNKS[trunk][1]
        state = {f"features.{name}": value for name, value in features.state_dict().items()}
        torch.save(state | {"classifier.1.bias": torch.zeros(3)}, file)
        made[trunk] = features.eval(), file
    return made


@pytest.fixture
def images():
    return torch.rand(3, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1


@pytest.fixture
def torch_cache(monkeypatch, tmp_path):
    """Use an empty cache of torch."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path


def distance(trunk, features, a, b):
    """Compute LPIPS by its definition.

    Squared differences of unit feature vectors are weighted per channel, averaged over positions, and summed.
    """
    weights = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / f"{trunk}.pth", "cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, total = torch.stack([(image - shift[:, None, None]) / scale[:, None, None] for image in (a, b)]), 0.0
    for number, layer in enumerate(features):
        x = layer(x)
        if number in RELUS[trunk]:
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            weight = weights[f"lin{RELUS[trunk].index(number)}.model.1.weight"][0]
            total += float(((unit[0] - unit[1]).square() * weight).sum(0).mean())
    return total


@torch.no_grad()
@pytest.mark.parametrize("trunk", TRUNKS)
def test_lpips_is_the_mean_over_pairs(trunks, images, trunk):
    features, file = trunks[trunk]
    generated, targets = images
    expected = [distance(trunk, features, a, b) for a in generated for b in targets]
    metric = Lpips(trunk, file)
    assert float(metric(generated, targets)) == pytest.approx(sum(expected) / 6, rel=1e-4)
    assert float(metric(generated[:1], generated[:1])) == pytest.approx(0, abs=1e-6)


def test_lpips_adds_up(trunks, images, assert_adds_up):
    generated, targets = images
    assert_adds_up(Lpips(weights=trunks["alex"][1]), images, (generated[:1], targets), (generated[1:], targets))


def test_small_images_are_enlarged(trunks, images):
    metric = Lpips(weights=trunks["alex"][1])
    generated, targets = (x[..., :32, :32] for x in images)  # smaller than AlexNet takes
    large = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in (generated, targets)]
    assert float(metric(generated, targets)) == pytest.approx(float(metric(*large)), rel=1e-6)


def test_network_is_frozen_and_has_no_dropout(trunks, images):
    metric = Lpips(weights=trunks["alex"][1])
    assert not any(p.requires_grad for p in metric.parameters())
    before = float(metric(*images))
    metric.train()  # as a LightningModule that holds it does
    assert float(metric(*images)) == before


def test_nothing_is_downloaded(torch_cache):
    assert str(torch_cache) in missing_lpips_weights()
    assert "VGG16" in missing_lpips_weights("vgg")
    with pytest.raises(UserError, match="AlexNet: there is no file"):
        Lpips()
    assert not list(torch_cache.rglob("*.pth"))


def test_weights_in_the_cache_are_used(torch_cache, trunks, images):
    file = trunks["alex"][1]
    (torch_cache / "hub" / "checkpoints").mkdir(parents=True)
    (torch_cache / "hub" / "checkpoints" / file.name).symlink_to(file)
    assert missing_lpips_weights() is None
    assert float(Lpips()(*images)) == float(Lpips(weights=file)(*images))


@pytest.mark.parametrize("content", ["text", "another network", "another object", "nothing"])
def test_wrong_file_is_refused(tmp_path, trunks, content):
    file = tmp_path / "mine.pth"
    file.write_bytes({"text": b"no weights", "another network": trunks["vgg"][1].read_bytes()}.get(content, b""))
    if content == "another object":
        torch.save([torch.zeros(3)], file)
    with pytest.raises(UserError, match=r"mine.pth does not hold the weights of torchvision's AlexNet"):
        Lpips(weights=file)


def test_message_names_the_missing_file(tmp_path):
    assert str(tmp_path / "mine.pth") in missing_lpips_weights(weights=tmp_path / "mine.pth")

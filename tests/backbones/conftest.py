import socket
import sys

import pytest
from hub import Hub


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    """Use an empty download folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "hub"


@pytest.fixture
def hub(monkeypatch, hub_cache):
    """Start a hub without models."""
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in ("constants", "file_download"):  # which has a copy in old versions
        monkeypatch.setattr(f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    yield hub
    hub.close()


@pytest.fixture
def attempts(monkeypatch):
    """Let every attempt to reach the network fail; return the attempts."""
    attempts = []
    # Recent versions of huggingface_hub detect agents once per process; each test starts like a new process.
    import huggingface_hub.utils  # noqa: F401

    if agents := sys.modules.get("huggingface_hub.utils._detect_agent"):
        monkeypatch.setattr(agents, "_registry", None)

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    return attempts

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from tests.serve.running import ECHO, SERVE, Server
from tests.serve.tiny import tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The tiny model in the form that `llmcore serve` loads."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture
def start():
    """Starts servers that end with the test."""
    servers = []

    def started(command, *options, **environment):
        servers.append(Server([*command, *map(str, options)], **environment))
        return servers[-1]

    yield started
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def tiny(folder):
    """`llmcore serve` of the tiny model."""
    server = Server([*SERVE, str(folder), "--port", "0", "--name", "tiny", "--cache-tokens", "4096"])
    yield server
    server.close()


@pytest.fixture(scope="module")
def echo():
    """A server whose model says what is between « and »."""
    server = Server(ECHO)
    yield server
    server.close()

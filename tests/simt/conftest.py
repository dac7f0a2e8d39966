from __future__ import annotations

import pytest

from tests.simt.emulation import MODES, emulator


@pytest.fixture(params=MODES, ids="-".join)
def emulated(request):
    """The test runs its ops on the emulator, once in each mode."""
    with emulator(*request.param):
        yield

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ddray.cluster.runtime import ray_runtime


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray for all of a module's tests that search in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDRAY_HOME", str(tmp_path_factory.mktemp("home")))
        with ray_runtime(None):
            yield

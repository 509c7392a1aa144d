"""Runs tests of the Triton kernels on the executor: ``pytest -p ptx.plugin tests/core/test_triton.py``.

PTX_SEED and PTX_ULPS set the options of the same names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ptx import launch
from ptx.execute import Options

#: Tests that cannot run on the executor.
LEFT_OUT = {
    "test_offsets_pass_two_to_the_thirty_first": "its memory is 4 GB, which is copied",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    out = [i for i in items if getattr(i, "originalname", i.name) in LEFT_OUT]
    config.hook.pytest_deselected(items=out)
    items[:] = [i for i in items if i not in out]


@pytest.fixture(autouse=True)
def fake_device() -> Iterator[launch.Device]:
    options = Options(
        seed=int(os.environ.get("PTX_SEED", "0")),
        ulps=int(os.environ.get("PTX_ULPS", "0")),
    )
    with launch.device(options) as device:
        yield device

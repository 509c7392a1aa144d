"""A pytest plugin that runs tests of the Triton kernels on the executor: ``-p ptx.plugin``.

PTX_SEED and PTX_ULPS set the options of the same names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ptx import launch
from ptx.execute import Options

#: Read memory that nobody has written, and turn it into NaN whatever it holds.
READ_FRESH = ("test_unsound_offsets_poison_loss_and_gradient",)


@pytest.fixture(autouse=True)
def fake_device(request: pytest.FixtureRequest) -> Iterator[launch.Device]:
    options = Options(
        seed=int(os.environ.get("PTX_SEED", "0")),
        ulps=int(os.environ.get("PTX_ULPS", "0")),
        poison=request.function.__name__ not in READ_FRESH,
    )
    with launch.device(options) as device:
        yield device

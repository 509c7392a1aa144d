"""Matrix products by MKL and by oneDNN: the same result, chosen by type, shape and layout alone."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from topr_kernels.linear import matmul
from topr_kernels.linear.matmul import mm

N, K, M = 2 * matmul.BLOCK_ROWS + 70, 257, 300


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    # On every processor, whichever is faster there.
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("layout_a", ["rows", "columns", "gap"])
@pytest.mark.parametrize("layout_b", ["rows", "columns", "gap"])
def test_equals_fp64(onednn: bool, accumulate: bool, layout_a: str, layout_b: str) -> None:
    g = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int, layout: str) -> torch.Tensor:
        if layout == "columns":
            return torch.randn(columns, rows, generator=g).t()
        return torch.randn(rows, columns + 3 * (layout == "gap"), generator=g)[:, :columns]

    a, b = matrix(N, K, layout_a), matrix(K, M, layout_b)
    # A part of a wider matrix, whose rest must stay as it is.
    wide = torch.randn(N, M + 5, generator=g)
    before = wide.clone()
    want = a.double() @ b.double() + (before[:, :M].double() if accumulate else 0)
    with mock.patch.object(matmul, "_onednn_mm", wraps=matmul._onednn_mm) as by_onednn:
        mm(a, b, wide[:, :M], accumulate)
    assert by_onednn.called == (onednn and layout_b != "gap")
    torch.testing.assert_close(wide[:, :M].double(), want, rtol=0, atol=1e-4)
    assert torch.equal(wide[:, M:], before[:, M:])


def test_small_products_other_types_and_torchs_own_switch_go_to_mkl(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    a, b = torch.randn(N, K), torch.randn(K, M)
    assert matmul._served_by_onednn(a, b)
    assert not matmul._served_by_onednn(a[:8], b)
    assert not matmul._served_by_onednn(a.double(), b.double())
    assert not matmul._served_by_onednn(a.to("meta"), b.to("meta"))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not matmul._served_by_onednn(a, b)


@pytest.mark.parametrize(
    ("capability", "vendor", "faster"),
    [
        ("AVX512", "AuthenticAMD", True),
        ("AVX512", "GenuineIntel", False),
        ("AVX2", "AuthenticAMD", False),
    ],
)
def test_chosen_where_mkl_leaves_avx512_unused(
    monkeypatch: pytest.MonkeyPatch, capability: str, vendor: str, faster: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(matmul, "_processor", lambda: f"processor : 0\nvendor_id : {vendor}\n")
    matmul.onednn_is_faster.cache_clear()
    try:
        assert matmul.onednn_is_faster() is faster
    finally:
        matmul.onednn_is_faster.cache_clear()


def test_without_the_operator_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(matmul, "_processor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    matmul.onednn_is_faster.cache_clear()
    try:
        assert not matmul.onednn_is_faster()
    finally:
        matmul.onednn_is_faster.cache_clear()

"""The peak rate behind utilisation: which data sheet applies, and how several processes' rates are combined."""

import pytest
import torch

from ds_roberta.training import peak
from ds_roberta.training.peak import Peak, data_sheet_rate, device_peak


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("A100-SXM4-40GB", 312),  # of drivers before 2021
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
    ],
)
def test_a_gpu_has_its_own_data_sheet(name, teraflops):
    assert data_sheet_rate(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA GH200 480GB",
        "NVIDIA H200 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
    ],
)
def test_a_gpu_of_a_like_name_has_not(name):
    assert data_sheet_rate(name) is None


def test_processes_share_the_mean_of_what_they_measured(on_ranks, monkeypatch):
    rates = iter([10e9, 30e9])
    monkeypatch.setattr(peak, "measured_rate", lambda device, precision: next(rates))
    found = on_ranks(2, lambda ranks: device_peak(torch.device("cpu"), "fp32", ranks))
    assert found == [Peak(20e9, "measured")] * 2


def test_larger_products_are_tried_until_they_would_take_too_long(monkeypatch):
    sizes = []

    def rate(device, precision, size, seconds):
        sizes.append(size)
        return {1_024: 3e11, 2_048: 5e11}[size]

    monkeypatch.setattr(peak, "product_rate", rate)
    assert peak.measured_rate(torch.device("cpu"), "bf16") == 5e11
    assert sizes == [1_024, 2_048]


def test_a_product_is_counted_in_operations_by_the_given_clock():
    ticks = iter(range(1_000))
    found = peak.product_rate(torch.device("cpu"), "fp32", 8, 0.0, lambda: next(ticks) / 4)
    assert found == 2 * 8**3 * 4

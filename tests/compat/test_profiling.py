"""`deepspeed.profiling.flops_profiler`."""

from __future__ import annotations

import pytest
import torch
from deepspeed.profiling.flops_profiler import FlopsProfiler, get_model_profile
from deepspeed.profiling.flops_profiler.profiler import (
    duration_to_string,
    flops_to_string,
    macs_to_string,
    number_to_string,
    params_to_string,
)
from torch import nn

import deepspeed


def model():
    return nn.Sequential(nn.Linear(1000, 500), nn.ReLU(), nn.Linear(500, 10))


def test_get_model_profile(capsys, tmp_path):
    flops, macs, params = get_model_profile(model(), (8, 1000), as_string=False, top_modules=2)
    assert macs == 8 * (1000 * 500 + 500 * 10)
    assert flops == 2 * macs + 8 * 500
    assert params == 1001 * 500 + 501 * 10
    assert "Largest classes of modules" in capsys.readouterr().out
    file = tmp_path / "reports" / "profile.txt"
    texts = get_model_profile(model(), args=[torch.ones(8, 1000)], output_file=str(file))
    assert texts == ("8.08 M", "4.04 MMACs", "505.51 k")
    assert "MMACs" in file.read_text()
    assert capsys.readouterr().out == ""
    net = model().train()
    get_model_profile(net, (1, 1000), print_profile=False)
    assert net.training
    with pytest.raises(ValueError, match="input_shape"):
        get_model_profile(model())


def test_the_profiler_around_a_loop(capsys):
    net = model()
    profiler = FlopsProfiler(net)
    with pytest.raises(RuntimeError, match="start_profile"):
        profiler.get_total_flops()
    profiler.start_profile(ignore_list=[nn.ReLU])
    net(torch.randn(2, 1000)).sum().backward()
    profiler.stop_profile()
    net(torch.randn(2, 1000))
    assert profiler.get_total_macs() == 2 * 505_000
    assert profiler.get_total_params(as_string=True) == "505.51 k"
    assert profiler.get_total_duration() > 0
    profiler.print_model_profile(profile_step=7, detailed=False)
    assert "of step 7" in capsys.readouterr().out
    profiler.reset_profile()
    net(torch.randn(1, 1000))
    assert profiler.get_total_macs() == 505_000
    profiler.end_profile()


def test_texts():
    assert number_to_string(1_500_000) == "1.50 M"
    assert number_to_string(1_500_000, units="K", precision=0) == "1500 K"
    assert flops_to_string(2.5e12) == "2.50 TFLOPS"
    assert flops_to_string(2.5e12, units="GFLOPS") == "2500.00 GFLOPS"
    assert macs_to_string(3e9) == "3.00 GMACs"
    assert params_to_string(7e9, units="B") == "7.00 G"
    assert duration_to_string(0.0025) == "2.50 ms"
    assert duration_to_string(0.0025, units="us") == "2500.00 us"
    assert deepspeed.profiling.flops_profiler.FlopsProfiler is FlopsProfiler

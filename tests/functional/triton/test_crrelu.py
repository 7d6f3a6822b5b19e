"""CRReLU's kernels: interpreted, on a GPU where there is one, compiled for GPUs that are not there, and refused."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_entropy.functional import crrelu, crrelu_kernels
from lightning_entropy.functional.triton import crrelu as launch
from tests.functional.triton.test_attention_entropy import INTERPRETED, run_apart

HERE = Path(__file__).parent


@pytest.fixture
def _triton() -> None:
    """Triton is part of the development environment on Linux: there its absence is an error, not a skip."""
    if find_spec("triton") is None:
        if sys.platform == "linux":
            pytest.fail('triton is not installed: pip install "lightning-entropy[dev]"')
        pytest.skip("triton is for Linux")


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("where", ["interpreter", "GPU"])
def test_the_kernels_are_exact(where: str, tmp_path: Path) -> None:
    if where == "GPU" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    cases = str(HERE / "crrelu_cases.py")
    arguments = ["-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=short", cases]
    output = run_apart(arguments, INTERPRETED if where == "interpreter" else {}, tmp_path)
    summary = output.strip().splitlines()[-1]
    assert " passed" in summary, output
    assert "skipped" not in summary, output
    assert int(summary.split(" passed")[0].split()[-1]) >= 56, output


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile_for_gpus(capability: int, tmp_path: Path) -> None:
    output = run_apart([str(HERE / "compile_crrelu.py"), str(capability)], {}, tmp_path)
    assert output.split() == ["forward", "backward_rows", "backward_columns"]


@pytest.mark.usefixtures("_triton")
def test_auto_takes_them_on_a_gpu_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with FakeTensorMode():  # a GPU's tensors without a GPU
        for dtype in launch.DTYPES:
            x = torch.empty(4, 8, device="cuda", dtype=dtype)
            assert crrelu_kernels._module("auto", x) is launch
            assert crrelu(x, 0.1).shape == (4, 8)
        assert crrelu_kernels._module("auto", torch.empty(4, device="cuda", dtype=torch.float64)) is None
        assert "CPUs" in str(crrelu_kernels.refusal("chunked", x))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
        assert "7.0" in str(launch.refusal(x))
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert "pip install" in str(launch.refusal(torch.empty(1)))


def test_importing_them_imports_no_triton(tmp_path: Path) -> None:
    code = "from lightning_entropy.functional import crrelu; import sys; print('triton' in sys.modules)"
    assert run_apart(["-c", code], {}, tmp_path).strip() == "False"

"""The fused kernel: interpreted, on a GPU where there is one, compiled for GPUs that are not there, and refused."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_entropy.functional import attention_entropy, two_call_entropy
from lightning_entropy.functional import triton as kernels
from lightning_entropy.functional.triton import attention_with_entropy, launch, refusal

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
INTERPRETED = {"TRITON_INTERPRET": "1"}


@pytest.fixture
def _triton() -> None:
    """Triton is part of the development environment on Linux: there its absence is an error, not a skip."""
    if find_spec("triton") is None:
        if sys.platform == "linux":
            pytest.fail('triton is not installed: pip install "lightning-entropy[dev]"')
        pytest.skip("triton is for Linux")


def run_apart(arguments: list[str], environment: dict[str, str], tmp_path: Path) -> str:
    """Output of a Python process that shares no imported triton with this one."""
    dropped = ("PYTEST_", "TRITON_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**inherited, "TRITON_CACHE_DIR": str(tmp_path / "triton"), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("where", ["interpreter", "GPU"])
def test_the_kernels_equal_the_map(where: str, tmp_path: Path) -> None:
    if where == "GPU" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    cases = str(HERE / "kernel_cases.py")
    arguments = ["-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=short", cases]
    output = run_apart(arguments, INTERPRETED if where == "interpreter" else {}, tmp_path)
    summary = output.strip().splitlines()[-1]
    assert " passed" in summary, output
    assert "skipped" not in summary, output
    assert int(summary.split(" passed")[0].split()[-1]) >= 70, output


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile_for_gpus(capability: int, tmp_path: Path) -> None:
    output = run_apart([str(HERE / "compile_kernels.py"), str(capability)], {}, tmp_path)
    assert output.split() == ["forward", "query_gradient", "key_gradient", "delta"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "triton"),
        ({"is_causal": True}, "triton"),
        ({"logit_softcap": 3.0}, "triton"),
        ({"queries": 9}, "triton"),
        ({"dtype": torch.float32}, "triton"),
        ({"dtype": torch.float64}, "two_call"),
        ({"dtype": torch.float64, "queries": 9}, "few_rows"),
        ({"dtype": torch.float64, "logit_softcap": 3.0}, "blockwise"),
        ({"width": 512, "queries": 600}, "two_call"),
        ({"bias": True}, "blockwise"),
    ],
)
@pytest.mark.usefixtures("_triton")
def test_auto_takes_it_on_a_gpu_where_it_can(
    options: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_entropy.functional import dot_product_entropy

    chosen = []
    choose = dot_product_entropy._fastest
    monkeypatch.setattr(dot_product_entropy, "_fastest", lambda *a: chosen.append(choose(*a)) or chosen[-1])
    options = dict(options)
    shape = (2, 4, 700, options.pop("width", 64))
    dtype = options.pop("dtype", torch.bfloat16)
    with FakeTensorMode():  # a GPU's tensors without a GPU: shapes only
        q, k = (torch.empty(shape, device="cuda", dtype=dtype) for _ in range(2))
        if options.pop("bias", False):
            options["attn_mask"] = torch.empty(700, 700, device="cuda", dtype=dtype)
        h = attention_entropy(q, k, **options)
    assert chosen == [expected]
    assert h.shape == (2, 4, options.get("queries", 700))


def test_auto_does_without_triton_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda: False)
    with FakeTensorMode():
        q = torch.empty(1, 2, 70, 64, device="cuda", dtype=torch.bfloat16)
        assert attention_entropy(q, q).shape == (1, 2, 70)


@pytest.mark.parametrize(
    ("dtype", "options", "expected"),
    [
        (torch.bfloat16, {}, "flash"),
        (torch.float16, {"causal": True}, "flash"),
        (torch.bfloat16, {"causal": True, "keys": 53}, "efficient"),
        (torch.float32, {"keys": 53}, "efficient"),
        (torch.float64, {}, None),
        (torch.float32, {"width": 20}, None),
        (torch.bfloat16, {"mask": True}, None),
    ],
)
def test_two_calls_on_a_gpu_take_the_log_sum_exp_from_the_attention(
    dtype: torch.dtype, options: dict[str, Any], expected: str | None
) -> None:
    causal, width = options.get("causal", False), options.get("width", 64)
    with FakeTensorMode():
        q = torch.empty(2, 4, 70, width, device="cuda", dtype=dtype)
        k = torch.empty(2, 4, options.get("keys", 70), width, device="cuda", dtype=dtype)
        mask = torch.ones(70, 70, dtype=torch.bool, device="cuda") if options.get("mask") else None
        assert two_call_entropy.cuda_operator(q, k, mask, causal) == expected
        out = attention_entropy(q, k, mask, causal, backend="two_call", return_lse=True)
    assert out.entropy.shape == out.lse.shape == (2, 4, 70)


def test_a_log_sum_exp_of_another_shape_is_not_taken() -> None:
    q = torch.empty(2, 4, 70, 64)
    assert two_call_entropy._rows_of(torch.zeros(2, 4, 96), q).shape == (2, 4, 70)
    with pytest.raises(RuntimeError, match=r"expected a log-sum-exp of \(2, 4, 70\).*got \(2, 4, 64\)"):
        two_call_entropy._rows_of(torch.zeros(2, 4, 64), q)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, 'float64 is not computed by the kernel .*use backend="blockwise"'),
        ({"width": 300}, "heads wider than 256 do not fit a tile"),
        ({"key_dtype": torch.float16}, "one dtype, got float32, float16"),
        ({"bias": True}, "an additive mask is not computed"),
        ({}, "runs on CUDA, and the tensors are on cpu"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dtype = change.get("dtype", torch.float32)
    q = torch.zeros(1, 2, 8, change.get("width", 16), dtype=dtype)
    k = q.to(change.get("key_dtype", dtype))
    mask = torch.zeros(8, 8) if change.get("bias") else None
    with pytest.raises(ValueError, match=message):
        attention_entropy(q, k, mask, backend="triton")
    with pytest.raises(ValueError, match=message):
        attention_with_entropy(q, k, k, attn_mask=mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": (1, 2, 8, 20)}, "same width, got 16 and 20"),
        ({"key": (1, 2, 0, 16), "value": (1, 2, 0, 16)}, "at least one key"),
        ({"value": (1, 2, 9, 16)}, "shape of key but for its width"),
        ({"key": (1, 1, 8, 16), "value": (1, 1, 8, 16)}, "2 query heads and 1 key heads: pass enable_gqa=True"),
        ({"query": (1, 3, 8, 16), "enable_gqa": True}, "3 query heads cannot share 2 key heads"),
        ({"query": (8, 16)}, "expected .* got a query of"),
        ({"logit_softcap": -1.0}, r"positive, got -1\.0"),
        ({"is_causal": True, "attn_mask": torch.ones(8, 8, dtype=torch.bool)}, "exclude each other"),
    ],
)
def test_shapes_and_arguments_that_do_not_fit(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    change = dict(change)
    tensors = [torch.zeros(change.pop(name, (1, 2, 8, 16))) for name in ("query", "key", "value")]
    with pytest.raises(ValueError, match=message):
        attention_with_entropy(*tensors, **change)


def test_absence_of_triton_is_one_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ImportError, match=r'pip install "lightning-entropy\[triton\]"'):
        attention_with_entropy(q, q, q)


def test_importing_the_room_imports_no_triton(tmp_path: Path) -> None:
    code = "import lightning_entropy.functional.triton, sys; print('triton' in sys.modules)"
    assert run_apart(["-c", code], {}, tmp_path).strip() == "False"


@pytest.mark.usefixtures("_triton")
def test_smaller_blocks_where_a_gpu_holds_less() -> None:
    from triton.runtime.errors import OutOfResources

    tried = []

    class Kernel:
        def __init__(self, holds: int) -> None:
            self.holds = holds

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def start(**options: Any) -> None:
                tried.append((grid, options["BLOCK_Q"], options["BLOCK_K"]))
                if options["BLOCK_Q"] * options["BLOCK_K"] > self.holds:
                    raise OutOfResources(200_000, 100_000, "shared memory")

            return start

    blocks = launch.candidates("forward", 128, 2)
    launch._launch(Kernel(1024), blocks, lambda b: 100 // b.queries)
    assert tried == [((0,), 128, 64), ((1,), 64, 32), ((3,), 32, 32)]
    with pytest.raises(OutOfResources):
        launch._launch(Kernel(1), blocks, lambda b: 1)


@pytest.mark.parametrize("kernel", ["forward", "query_gradient", "key_gradient"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_each_width_has_blocks_and_the_last_are_small(kernel: str, itemsize: int) -> None:
    for width in (16, 32, 64, 128, 256):
        blocks = launch.candidates(kernel, width, itemsize)
        assert len(set(blocks)) == len(blocks)
        assert blocks[-1][:2] == (16, 16)
        sizes = [b.queries * b.keys for b in blocks]
        assert sizes == sorted(sizes, reverse=True)


def test_the_reason_names_the_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with FakeTensorMode():
        q = torch.empty(1, 2, 70, 64, device="cuda", dtype=torch.float16)
        assert "compute capability 8.0" in str(refusal(q, q))

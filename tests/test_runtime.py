"""Devices, types, sizes and messages."""

import subprocess
import sys

import pytest
import torch

from compresso import runtime
from compresso.config import build
from compresso.errors import ConfigError, ResourceError
from compresso.runtime import Runtime, format_bytes, make_runtime, parse_bytes
from compresso.settings import RuntimeSettings


def made(**values):
    return make_runtime(build(RuntimeSettings, values, where="test"))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4096", 4096),
        ("2GB", 2 * 10**9),
        ("2 gb", 2 * 10**9),
        ("1.5G", 1_500_000_000),
        ("2GiB", 2 * 2**30),
        ("500MiB", 500 * 2**20),
        ("1kB", 1000),
        ("3T", 3 * 10**12),
    ],
)
def test_sizes_are_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2 apples", "1e9", "2I"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize("count", [0, 999, 1000, 1.5e6, 2e9, 7.25e12])
def test_sizes_are_written_as_they_are_read(count):
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.01)


def test_float32_is_not_rounded():
    torch.set_float32_matmul_precision("medium")
    made(device="cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


def test_every_process_is_on_its_own_gpu(monkeypatch):
    """Also what PyTorch puts on the current one, such as a mesh of devices."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    made(device="cuda")
    assert not current
    places = {"MASTER_ADDR": "x", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    assert made(device="cuda").device == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]
    made(device="cpu")
    assert len(current) == 1


def test_what_the_launcher_was_told_in_vain_is_said(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "false")
    made(device="cpu")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    made(device="cpu")
    said = capsys.readouterr().err
    assert "`--mixed_precision bf16` of `accelerate launch` does nothing" in said
    assert "`--fsdp_offload_params true`" in said


def test_settings_are_taken():
    chosen = made(device="cpu", dtype="bfloat16", max_memory="1MB", trust_remote_code=True)
    assert chosen == Runtime(torch.device("cpu"), torch.bfloat16, 10**6, True)
    assert made(device="cpu").dtype is None


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "tpu", "cuda:", ""])
def test_unknown_devices_are_refused(device):
    with pytest.raises(ConfigError, match="unknown device"):
        made(device=device)


def test_a_missing_device_is_refused():
    with pytest.raises(ResourceError, match="no device `cuda:99`"):
        made(device="cuda:99")


def test_auto_device_exists():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert made().device.type == expected


@pytest.mark.parametrize(
    ("device", "native", "stored", "computed"),
    [
        ("cuda", False, torch.bfloat16, torch.bfloat16),
        ("cuda", False, torch.float16, torch.float16),
        ("cuda", False, torch.float32, torch.float32),
        ("cpu", True, torch.bfloat16, torch.bfloat16),
        ("cpu", False, torch.bfloat16, torch.float32),
        ("cpu", True, torch.float16, torch.float32),
        ("cpu", True, torch.float32, torch.float32),
    ],
)
def test_blocks_run_in_the_fastest_safe_type(monkeypatch, device, native, stored, computed):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    automatic = Runtime(torch.device(device), None, 0, False)
    assert automatic.compute_dtype(stored) == computed
    forced = Runtime(torch.device(device), torch.float32, 0, False)
    assert forced.compute_dtype(stored) == torch.float32


def test_memory_is_measured():
    """In a process of its own, as a peak is never forgotten, whatever started it has taken."""
    code = """
from compresso.runtime import peak_memory
before = peak_memory()
taken = b"x" * 150_000_000
assert before < 100e6 and 140e6 < peak_memory() - before < 200e6, (before, peak_memory())
"""
    taken = torch.ones(60_000_000)  # without pages that are written to, it would take no memory
    subprocess.run([sys.executable, "-c", code], check=True)
    assert runtime.peak_memory() > taken.nbytes
    assert runtime.free_memory() > 0


def test_messages_go_to_stderr_as_they_are(capsys):
    runtime.log("`a` [b]")
    runtime.warn("`c` [red] [/]")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "`a` [b]\nwarning: `c` [red] [/]\n"


def test_progress_is_lines_where_there_is_no_terminal(capsys):
    assert list(runtime.track("abc", 3, "blocks")) == ["a", "b", "c"]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == ["blocks: 3/3 in 0 s"]


def test_lines_tell_what_is_left(capsys):
    ticks = iter([0.0, 11.0, 12.0, 40.0])
    items = runtime._lines("abc", 3, "blocks", lambda: next(ticks))
    assert list(items) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == [
        "blocks: 1/3, about 22 s left",
        "blocks: 3/3 in 40 s",
    ]


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert list(runtime.track("ab", 2, "blocks")) == ["a", "b"]
    shown = capsys.readouterr()
    assert shown.out == "" and "2/2" in shown.err and "━" in shown.err


def test_no_color_is_respected(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    runtime.warn("x")
    assert "\x1b[33m" in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    runtime.warn("x")
    assert "\x1b[33m" not in capsys.readouterr().err


def test_libraries_are_quiet_unless_asked_not_to_be(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    monkeypatch.delenv("HF_DATASETS_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    runtime.quiet_libraries()
    assert runtime.os.environ["TRANSFORMERS_VERBOSITY"] == "debug"
    assert runtime.os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1"

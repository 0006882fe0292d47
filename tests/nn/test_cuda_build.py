"""NVRTC and the cache, and what the compiler makes of the kernel: registers and instructions.

None of it needs a GPU. NVRTC comes with every CUDA build of torch, and the disassembler with
Triton.
"""

import functools
import itertools
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from bnfreeze.nn.activations import ACTIVATIONS
from bnfreeze.nn.cuda import build
from bnfreeze.nn.cuda import plan as plans
from bnfreeze.nn.cuda.build import KernelError, compile_source, cubin, program
from bnfreeze.nn.cuda.plan import entry_point

ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
NAMES = [str(name).upper() for name in ACTIVATIONS]
RESIDUALS = ["ALONE", "ADD", "AFFINE_ADD"]


@functools.cache
def has_nvrtc():
    try:
        build.bindings("nvrtc")
    except KernelError:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason="needs NVRTC")


def every_variant():
    found = ["finish"]
    for (dtype, lanes), activation, residual in itertools.product(
        plans._LANES.items(), NAMES, RESIDUALS
    ):
        forward = f"Forward<{activation}, {residual}>"
        backward = f"Backward<{activation}, {residual}>"
        for width in (lanes, 1):
            head = f"<{dtype}, {width}, "
            for op in (forward, backward):
                found += [f"planes{head}{op}, {wide}>" for wide in ("false", "true")]
                found.append(f"rows{head}{op}, false>")
            found += [f"rows{head}{backward}, true>", f"planes_trained{head}{backward}>"]
    return found


EVERY = every_variant()


def tool(name):
    triton = pytest.importorskip("triton")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        pytest.skip(f"this Triton brings no {name}")
    return path


def output_of(name, *arguments):
    """What one of the tools of Triton prints."""
    done = subprocess.run([tool(name), *arguments], capture_output=True, check=True)
    return done.stdout.decode(errors="replace")


def check(variants, arch, folder):
    code = compile_source(program(variants), arch)
    assert code[:4] == b"\x7fELF"  # machine code, not PTX
    file = folder / "all.cubin"
    file.write_bytes(code)
    pattern = r"Function (bnfreeze_\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    resources = re.findall(pattern, output_of("cuobjdump", "-res-usage", file))
    assert {name for name, *_ in resources} == {entry_point(variant) for variant in variants}
    for name, registers, stack, local in resources:
        assert (stack, local) == ("0", "0"), f"{name} spills"
        assert int(registers) <= 128, f"{name}: two blocks must fit"
    sections = re.split(r"\.section\s+\.text\.(bnfreeze_\w+)", output_of("nvdisasm", "-c", file))
    for name, text in zip(sections[1::2], sections[2::2], strict=True):
        assert not re.search(r"\b(LDL|STL)\b", text), f"{name} spills"
        wide = [bool(re.search(rf"\b{op}\.E\S*\.128\b", text)) for op in ("LDG?", "STG?")]
        vector = re.search(r"_(f32_4|f16_8|bf16_8)_", name) is not None
        assert wide == [vector, vector], name


@needs_nvrtc
def test_some_variants_compile_without_spills(tmp_path):
    # 181 shares no factor with the lists that are multiplied above, so these are a mixture.
    for arch in ("sm_75", "sm_120"):
        check(EVERY[3::181], arch, tmp_path)


# Every variant for one architecture, and an eighth of them, each time another, for the others.
SAMPLES = [("sm_90", start) for start in range(8)]
SAMPLES += [(arch, start) for start, arch in enumerate(ARCHITECTURES) if arch != "sm_90"]


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "start"), SAMPLES)
def test_every_variant_compiles_without_spills(arch, start, tmp_path):
    check(EVERY[start::8], arch, tmp_path)


@needs_nvrtc
def test_an_error_of_the_compiler_is_reported():
    with pytest.raises(KernelError, match=r"for sm_90: .*frozen_bn\.cu.*error"):
        compile_source("this is no CUDA", "sm_90")
    with pytest.raises(KernelError, match="sm_13"):
        compile_source("", "sm_13")


def test_without_nvrtc_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(KernelError, match="pip install cuda-bindings"):
        cubin("finish", "sm_90")


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A compiler that counts, and a cache of its own."""
    calls = []

    def compile_source(source, arch):
        calls.append(arch)
        return f"cubin of {len(source)} for {arch}".encode()

    monkeypatch.setenv("BNFREEZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "compile_source", compile_source)
    installed(monkeypatch, 2)
    return calls


def installed(monkeypatch, minor):
    nvrtc = SimpleNamespace(nvrtcVersion=lambda: (0, 13, minor))
    monkeypatch.setattr(build, "bindings", lambda part: nvrtc)


VARIANT, OTHER = EVERY[1], EVERY[2]


def test_a_second_call_reads_the_cache(compiler, tmp_path):
    first = cubin(VARIANT, "sm_90")
    assert cubin(VARIANT, "sm_90") == first
    assert compiler == ["sm_90"]
    (file,) = (tmp_path / "cache").iterdir()
    assert file.suffix == ".cubin"


def test_the_cache_knows_source_architecture_version_and_options(compiler, monkeypatch):
    cubin(VARIANT, "sm_90")
    cubin(VARIANT, "sm_80")
    cubin(OTHER, "sm_90")
    installed(monkeypatch, 3)
    cubin(VARIANT, "sm_90")
    monkeypatch.setattr(build, "_OPTIONS", ("--std=c++20",))
    cubin(VARIANT, "sm_90")
    assert len(compiler) == 5


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 100])
def test_a_corrupt_cache_file_is_replaced(compiler, tmp_path, damage):
    first = cubin(VARIANT, "sm_90")
    (file,) = (tmp_path / "cache").iterdir()
    for broken in (damage, file.read_bytes()[:-1]):
        file.write_bytes(broken)
        assert cubin(VARIANT, "sm_90") == first
    assert len(compiler) == 3
    assert cubin(VARIANT, "sm_90") == first
    assert len(compiler) == 3


def test_a_cache_that_cannot_be_written_is_no_error(compiler, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert cubin(VARIANT, "sm_90") == cubin(VARIANT, "sm_90")
    assert len(compiler) == 2
    monkeypatch.setenv("BNFREEZE_CACHE", str(tmp_path / "other"))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    cubin(VARIANT, "sm_90")
    assert list((tmp_path / "other").iterdir()) == []


def test_the_cache_lies_where_caches_lie(monkeypatch):
    monkeypatch.delenv("BNFREEZE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert build.cache_folder() == Path("/somewhere/bnfreeze")
    monkeypatch.setenv("BNFREEZE_CACHE", "/elsewhere")
    assert build.cache_folder() == Path("/elsewhere")


def test_two_may_race_for_the_cache(compiler, tmp_path, monkeypatch):
    barrier, written = threading.Barrier(2), []
    write = build._write

    def at_once(path, code):
        barrier.wait()
        write(path, code)

    monkeypatch.setattr(build, "_write", at_once)
    racers = [
        threading.Thread(target=lambda: written.append(cubin(VARIANT, "sm_90"))) for _ in "12"
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert len(compiler) == 2
    assert written[0] == written[1]
    (file,) = (tmp_path / "cache").iterdir()
    assert build._read(file) == written[0]

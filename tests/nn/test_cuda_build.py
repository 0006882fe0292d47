"""NVRTC and the cache, and what the compiler makes of the kernel: registers and instructions.

None of it needs a GPU. NVRTC comes with every CUDA build of torch, and the disassembler with
Triton.
"""

import functools
import itertools
import multiprocessing
import os
import re
import subprocess
from pathlib import Path

import pytest

from bnfreeze.nn.activations import KERNEL_NAMES
from bnfreeze.nn.cuda import build
from bnfreeze.nn.cuda import plan as plans
from bnfreeze.nn.cuda.build import KernelError, compile_source, cubin, program
from bnfreeze.nn.cuda.plan import Variant

ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
RESIDUALS = ["ALONE", "ADD", "AFFINE_ADD"]


@functools.cache
def has_nvrtc():
    try:
        build._nvrtc()
    except KernelError:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason="needs NVRTC")


def every_variant():
    found = [Variant("finish")]
    for (dtype, lanes), activation, residual in itertools.product(
        plans._LANES.items(), KERNEL_NAMES.values(), RESIDUALS
    ):
        forward = f"Forward<{activation}, {residual}>"
        backward = f"Backward<{activation}, {residual}>"
        for width in (lanes, 1):
            head = f"<{dtype}, {width}, "
            found += [
                Variant(text)
                for text in (
                    f"planes{head}{forward}, false>",
                    f"planes{head}{forward}, true>",
                    f"rows{head}{forward}, false>",
                    f"planes{head}{backward}, false>",
                    f"planes{head}{backward}, true>",
                    f"rows{head}{backward}, false>",
                    f"rows{head}{backward}, true>",
                    f"planes_trained{head}{backward}>",
                )
            ]
    return found


EVERY = every_variant()
# Each architecture compiles a different part of the 721 in every run, and the slow tests compile
# all. 97 shares no factor with the lists that are multiplied above, so a part is a mixture.
SHARE = 97


def tool(name):
    triton = pytest.importorskip("triton")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        pytest.skip(f"this Triton brings no {name}")
    return path


@functools.cache
def compiled(arch, start, step):
    part = EVERY[start::step]
    return part, compile_source(program(part), arch)


def resources_of(code, folder):
    """What each entry point takes: registers, stack bytes, local bytes."""
    file = folder / "all.cubin"
    file.write_bytes(code)
    said = subprocess.run(
        [tool("cuobjdump"), "-res-usage", file], capture_output=True, text=True, check=True
    ).stdout
    pattern = r"Function (bnfreeze_\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    return {name: tuple(map(int, rest)) for name, *rest in re.findall(pattern, said)}


def assembly_of(code, folder):
    """The machine code of each entry point, as text."""
    file = folder / "all.cubin"
    file.write_bytes(code)
    said = subprocess.run(
        [tool("nvdisasm"), "-c", file], capture_output=True, check=True
    ).stdout.decode(errors="replace")
    sections = re.split(r"\.section\s+\.text\.(bnfreeze_\w+)", said)[1:]
    return dict(zip(sections[::2], sections[1::2], strict=True))


def check(variants, code, folder):
    assert code[:4] == b"\x7fELF"  # machine code, not PTX
    resources = resources_of(code, folder)
    assert set(resources) == {variant.name for variant in variants}
    for name, (registers, stack, local) in resources.items():
        assert (stack, local) == (0, 0), f"{name} spills"
        assert registers <= 128, f"{name}: two blocks must fit"
    for name, text in assembly_of(code, folder).items():
        assert not re.search(r"\b(LDL|STL)\b", text), f"{name} spills"
        wide = [bool(re.search(rf"\b{op}\.E\S*\.128\b", text)) for op in ("LDG?", "STG?")]
        vector = re.search(r"_(f32_4|f16_8|bf16_8)_", name) is not None
        assert wide == [vector, vector], name


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_variants_compile_for_every_architecture_without_spills(arch, tmp_path):
    check(*compiled(arch, ARCHITECTURES.index(arch), SHARE), tmp_path)


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("start", range(8))
def test_every_variant_compiles_for_every_architecture_without_spills(arch, start, tmp_path):
    check(*compiled(arch, start, 8), tmp_path)


@needs_nvrtc
def test_an_error_of_the_compiler_is_reported():
    with pytest.raises(KernelError, match=r"for sm_90: .*frozen_bn\.cu.*error"):
        compile_source("this is no CUDA", "sm_90")
    with pytest.raises(KernelError, match="sm_13"):
        compile_source("", "sm_13")


def test_without_nvrtc_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(KernelError, match="pip install cuda-bindings"):
        cubin(Variant("finish"), "sm_90")


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A compiler that counts, and a cache of its own."""
    calls = []

    def compile_source(source, arch):
        calls.append(arch)
        return f"cubin of {len(source)} for {arch}".encode()

    monkeypatch.setenv("BNFREEZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "compile_source", compile_source)
    monkeypatch.setattr(build, "_nvrtc_version", lambda: (13, 2))
    return calls


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
    monkeypatch.setattr(build, "_nvrtc_version", lambda: (13, 3))
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


def race(folder, barrier, results):
    os.environ["BNFREEZE_CACHE"] = folder
    barrier.wait()
    results.put(cubin(Variant("finish"), "sm_90"))


@needs_nvrtc
def test_two_processes_may_race_for_the_cache(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    racers = [
        context.Process(target=race, args=(str(tmp_path), barrier, results)) for _ in range(2)
    ]
    for racer in racers:
        racer.start()
    first, second = results.get(), results.get()
    for racer in racers:
        racer.join()
    assert first == second
    (file,) = tmp_path.iterdir()
    assert build._read(file) == first

"""What every test shares: the devices, and which tests this environment can run."""

import gc
import importlib.util
import os
import signal
import tempfile

import jax
import jaxlib
import pytest

# Most of the work of small tests is compilation. LLVM optimises nothing. In jaxlib 0.10
# loops are also written without MLIR, and LLVM reads each program in one piece, which
# halves what is left; of later versions these switches are not known. XLA's own passes
# stay, but for some copies: a test that reads what was compiled takes `for_users` of
# tests/compiled.py. `XLA_FLAGS= pytest` tests what users run, in over twice the time.
FLAGS = "--xla_backend_optimization_level=0"
if jaxlib.__version__.startswith("0.10."):
    FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)

# Where the shell started us behind its back (`pytest &`), an interrupt is ignored, by
# all that tests start as well; some of them are interrupted.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Eight devices, so that a mesh can be tested on any machine. It has to be said before
# the first array is made; arrays that name no device still live on the first one.
jax.config.update("jax_num_cpu_devices", 8)
# Equal programs are compiled once a run. They are kept in a folder of this run, so that
# a test never depends on an earlier one; the workers of `-n` share it.
PROGRAMS = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    PROGRAMS = tempfile.TemporaryDirectory(prefix="collab_jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

# The library never needs torch; the comparison with it runs where it is installed.
TORCH = importlib.util.find_spec("torch") is not None
# Golden vectors are made by scripts that need it too.
collect_ignore = ["golden"] if TORCH else ["golden", "parity"]


def pytest_unconfigure(config):
    """Removes the programs."""
    del config
    if PROGRAMS:
        PROGRAMS.cleanup()


def pytest_collection_finish(session):
    """What was imported stays: the garbage collector looks at it no more."""
    del session
    gc.collect()
    gc.freeze()


def pytest_report_header(config):
    """Says what is left out, so that a green run is not taken for more than it is."""
    del config
    devices = f"jax {jax.__version__}, {jax.device_count()} {jax.default_backend()}"
    absent = "" if TORCH else "; tests/parity left out: torch is not installed"
    return f"collab_jax: {devices} devices{absent}"


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Compiled programs leave the memory with the module that made them."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a tiny model."""
    from command_line import write_model

    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder)
    return str(folder)


@pytest.fixture
def read_in_blocks(monkeypatch):
    """Sets how many slots attention reads at once; layers are traced anew then."""
    from collab_jax.models import attention

    before = attention.CPU_BLOCK

    def change(block):
        if block != before:
            monkeypatch.setattr(attention, "CPU_BLOCK", block)
            jax.clear_caches()

    yield change
    if before != attention.CPU_BLOCK:
        jax.clear_caches()


@pytest.fixture(params=["generic", "avx2", "avx512", "vnni", "bf16", "neon"])
def instructions(request, monkeypatch):
    """Each instruction set of this processor, in turn."""
    from collab_jax import native

    if request.param not in native.status():
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("COLLAB_JAX_NATIVE", request.param)
    return request.param

"""What every test shares: the devices, and which tests this environment can run."""

import importlib.util

import jax
import pytest

# Eight devices, so that a mesh can be tested on any machine. It has to be said before
# the first array is made; arrays that name no device still live on the first one.
jax.config.update("jax_num_cpu_devices", 8)

# The library never needs torch; the comparison with it runs where it is installed.
TORCH = importlib.util.find_spec("torch") is not None
# Golden vectors are made by scripts that need it too.
collect_ignore = ["golden"] if TORCH else ["golden", "parity"]


def pytest_report_header(config):
    """Says what is left out, so that a green run is not taken for more than it is."""
    del config
    devices = f"jax {jax.__version__}, {jax.device_count()} {jax.default_backend()}"
    absent = "" if TORCH else "; tests/parity left out: torch is not installed"
    return f"collab_jax: {devices} devices{absent}"


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Equal programs compile once, as they do for a user, but in a folder of ours."""
    folder = str(tmp_path_factory.mktemp("programs"))
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a tiny model."""
    from command_line import write_model

    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder)
    return str(folder)

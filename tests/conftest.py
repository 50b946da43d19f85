"""What every test shares: the devices, and which tests this environment can run."""

import importlib.util

import jax

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

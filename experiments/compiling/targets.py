"""Machines that need not be here, and whose compilers are.

`libtpu` compiles for any slice by its name, and the CUDA plugin for any GPU by its
description; neither needs a device. Both come with the extras `tpu` and `cuda`.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

H200 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


class Target(NamedTuple):
    """Chips of a kind."""

    platform: str
    count: int
    memory: float  # GB of a chip; 0 where it does not matter
    topology: str  # as the compiler calls it


TARGETS = {
    "8 x TPU v5e": Target("tpu", 8, 16, "v5e:2x4"),
    "4 x TPU v5p": Target("tpu", 4, 95, "v5p:2x2x1"),
    "1 x H200": Target("cuda", 1, 141, "1x1x1"),
    "8 x H200": Target("cuda", 8, 141, "1x1x8"),
    "8 x CPU": Target("cpu", 8, 0, ""),  # this one, for a trial
}
PACKAGES = {"tpu": ("libtpu", "tpu"), "cuda": ("jax_cuda13_plugin", "cuda")}


def missing(target: Target) -> str | None:
    """What must be installed for a target, if it is not."""
    if target.platform not in PACKAGES:
        return None
    package, extra = PACKAGES[target.platform]
    if importlib.util.find_spec(package):
        return None
    return f"{package} is not installed: pip install -e '.[{extra}]'"


def devices(target: Target) -> Any:
    """The chips, as an array of devices that can only be compiled for."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    if target.platform == "cpu":
        return np.array(jax.devices()[: target.count])
    options = {"topology_name": target.topology}
    if target.platform == "cuda":
        options = {"topology_name": "", "topology": target.topology}
        options["target_config"] = H200
    else:  # it would ask a cloud which machine this is
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    found = topologies.get_topology_desc(platform=target.platform, **options)
    return np.array(found.devices)


@contextmanager
def as_if_on(target: Target) -> Iterator[None]:
    """What the library asks `jax.default_backend()`, it is told of the target."""
    name = "gpu" if target.platform == "cuda" else target.platform
    with mock.patch("jax.default_backend", return_value=name):
        yield

"""What the compiler makes of a program for users, where a test reads that."""

import jaxlib

# Most tests run without these emitters (conftest.py): a few more values are copied.
OPTIONS = {}
if jaxlib.__version__.startswith("0.10."):
    OPTIONS["xla_cpu_use_fusion_emitters"] = True


def for_users(lowered):
    """The compiled program, with all passes of XLA as users run them."""
    return lowered.compile(compiler_options=OPTIONS)

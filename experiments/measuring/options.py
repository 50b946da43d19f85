"""What every script on models can be told."""

import argparse
import os
from pathlib import Path


def options(doc: str) -> argparse.ArgumentParser:
    """A parser with `--smoke`, `--data` and `--output`.

    Args:
      doc: docstring of the script, whose first line becomes the description.
    """
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a random toy, seconds")
    parser.add_argument(
        "--data",
        metavar="DIR",
        default=os.environ.get("COLLAB_JAX_DATA"),
        help="the folder of data; unless given $COLLAB_JAX_DATA",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the report")
    return parser

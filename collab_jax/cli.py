"""The command line: `collab-jax COMMAND`.

JAX and the models are imported by the commands when they run, so that help is quick.
What a user can get wrong ends in one line on stderr and status 2.
"""

import atexit
import gc
import os
import signal
import sys
from typing import Any, NoReturn, cast

import click
from click.exceptions import NoArgsIsHelpError

from collab_jax import __version__
from collab_jax.commands import (
    demo,
    evaluate,
    generate,
    inspect,
    merge,
    models,
    score,
)


class _Commands(click.Group):
    """A group whose errors are one line."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        run: Any = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **extra)
        try:
            status = run(*args, standalone_mode=False, **extra)
        except NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except click.ClickException as error:
            _refuse(error.format_message())
        except (click.Abort, KeyboardInterrupt):
            click.echo("collab-jax: interrupted", err=True)
            sys.exit(128 + signal.SIGINT)
        except BrokenPipeError:
            # the reader of our output went away, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (ValueError, OSError, FloatingPointError) as error:
            if os.environ.get("COLLAB_JAX_TRACEBACK"):
                raise
            _refuse(str(error) or type(error).__name__)
        sys.exit(status if isinstance(status, int) else 0)


def _refuse(message: str) -> NoReturn:
    click.echo(f"collab-jax: {' '.join(message.split())}", err=True)
    sys.exit(2)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 88},
    epilog="COLLAB_JAX_TRACEBACK=1 shows where an error came from.",
)
@click.version_option(__version__, prog_name="collab-jax")
def cli() -> None:
    """Large language models that work together, in JAX.

    SOURCE is a short name (see `collab-jax models`), a folder in the Hugging Face
    layout, a .gguf file, or a repository ORG/NAME of the Hugging Face Hub.

    \b
    collab-jax pull smollm2-135m-instruct
    collab-jax generate smollm2-135m-instruct --chat --prompt "Why is the sky blue?"
    """


for command in (
    models.pull,
    models.models,
    generate.generate,
    score.score,
    evaluate.evaluate,
    merge.merge,
    inspect.inspect,
    demo.demo,
):
    cli.add_command(command)


def main() -> None:
    """The console script."""
    # JAX makes a million objects that stay: to look for cycles among them, while it is
    # imported and once more at the end, takes a third of a second
    gc.set_threshold(100_000, 50, 50)
    atexit.register(gc.freeze)
    # transformers would import torch where it finds it, which takes seconds and 300 MB
    sys.modules.setdefault("torch", cast(Any, None))
    try:
        cli()
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:
            # an orderly exit would wait for the program that runs on the device
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
        raise

"""`python -m collab_jax` is the command `collab-jax`."""

from collab_jax.cli import main

if __name__ == "__main__":
    main()

"""What tells before a merge whether it can work, from the files of the models."""

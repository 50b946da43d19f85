"""Collaboration in parameter space: merges as chains of small transforms."""

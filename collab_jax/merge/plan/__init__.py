"""A merge configuration in YAML, from its text to one target for each tensor."""

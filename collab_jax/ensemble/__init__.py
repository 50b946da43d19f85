"""Models that answer together: one law, or one answer, made of several."""

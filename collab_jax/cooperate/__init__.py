"""Models that cooperate: one speeds up, teaches or corrects another."""

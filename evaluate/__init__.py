"""Evaluate: answers side by side and held-out loss, with paired intervals."""

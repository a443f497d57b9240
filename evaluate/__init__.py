"""Evaluate: answers side by side, held-out loss, tasks and judges, with paired intervals."""

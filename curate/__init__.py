"""Curate: distill answers from a teacher, score them, choose among them, filter, deduplicate, select."""

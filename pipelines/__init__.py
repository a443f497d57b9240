"""Pipelines: recipes that chain the rooms, and the report."""

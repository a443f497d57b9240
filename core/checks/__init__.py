"""Checks of answers that need no model: numbers, programs in a sandbox, written instructions, JSON schemas."""

"""Engines: one file for each way of running a model; `base` says what an engine is, `registry` opens one by name."""

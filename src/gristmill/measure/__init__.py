"""Measuring a model on tasks of lm-evaluation-harness, on our decoder directly."""

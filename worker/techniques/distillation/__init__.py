"""Distillation as a step: a student in the place of the model."""

"""Distillation in a training: teachers and their answers, which layers are compared, and how."""

"""Checkpoints of a job: a training's whole state, so that a new attempt goes on where a killed one was.

The child writes them (`points`) as files without code in them (`file`); the supervisor stores them (`keeper`).
"""

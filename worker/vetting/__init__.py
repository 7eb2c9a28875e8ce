"""Uploaded files are hostile until vetted: what they are, what is in them, and that nothing in them reaches further.

Nothing here loads a model or a dataset. Each function takes the error class to raise, so that models and datasets share
it: `ModelRejected` for one, `DatasetRejected` for the other.
"""

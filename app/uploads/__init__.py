"""Uploads: how bytes come in, whole or in pieces or as a reference, and become models and datasets."""

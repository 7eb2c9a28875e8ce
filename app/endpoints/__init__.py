"""One module a REST resource."""

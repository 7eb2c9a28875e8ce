"""Students for a distillation: other networks of the kind of an uploaded model, with a start from its weights."""

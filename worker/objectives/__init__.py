"""What a model's outputs mean: targets, loss, distance to a teacher and metric; one module a family of tasks."""

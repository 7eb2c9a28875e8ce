"""Random changes of training samples: pure functions on batches, with every number out of one generator."""

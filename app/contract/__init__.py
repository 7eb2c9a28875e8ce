"""What app and worker agree on: specs, states, errors, the store, the blobs and the queue. No torch, no FastAPI."""

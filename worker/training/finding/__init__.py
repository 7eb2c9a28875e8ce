"""Settings of a training that find themselves, on copies of the model: learning rate, batch size, optimizer."""

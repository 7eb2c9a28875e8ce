"""What models are judged by: torchmetrics, wrapped. Tasks say which metrics, and what of a batch goes into them."""

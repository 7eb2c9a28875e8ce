"""How raw samples become the inputs of a Hugging Face model: by its own processor or tokenizer, or arrays as given."""

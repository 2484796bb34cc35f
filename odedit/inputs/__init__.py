"""Edit requests as tensors: prompts, tokens, batches."""

"""The cache of prepared images, latents and text embeddings, outside the data and keyed by content."""

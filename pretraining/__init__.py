"""Step 3: token chunks to checkpoints."""

"""Steps 4 to 6: a checkpoint to a model that litgpt and transformers load."""

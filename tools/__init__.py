"""Commands beside the steps: look at data, draw curves."""

"""What touches the logits: see README.md in this folder."""

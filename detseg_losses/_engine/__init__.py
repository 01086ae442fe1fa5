"""What touches the logits; README.md in this folder says how."""

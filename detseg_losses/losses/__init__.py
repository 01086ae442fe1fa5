"""The losses, each family in a file."""

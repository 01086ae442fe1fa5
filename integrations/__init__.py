"""Adapters to other libraries and readers of data formats; each file needs one third party only."""

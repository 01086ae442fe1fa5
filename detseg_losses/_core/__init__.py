"""What losses share beside the engines."""

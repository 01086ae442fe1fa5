"""What the command-line tools share: configuration, data, models, training engine and reports."""

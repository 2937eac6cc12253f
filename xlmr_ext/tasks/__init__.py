"""What models are used for: each task with its features, its loss and what a user calls."""

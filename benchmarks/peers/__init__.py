"""What Ravine is held against, run in an environment of its own, where nothing of Ravine is (`make bench-peers`)."""

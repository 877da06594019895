"""The server of Ravine."""

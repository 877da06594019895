"""What the service is held against: each an application of its own on the same uvicorn, run as a module."""

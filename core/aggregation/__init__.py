"""Many contributions, one step: what is reduced, when, and from whom."""

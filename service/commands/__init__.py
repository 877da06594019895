"""Commands about what the store holds: they run beside a service or without one, on one machine or in a container."""

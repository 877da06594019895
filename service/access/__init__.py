"""Who may do what: keys and whose they are, the rights of each call, and the gate that every request passes."""

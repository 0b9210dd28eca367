"""Reading checkpoints safely: never by an unrestricted unpickler, and without importing torch."""

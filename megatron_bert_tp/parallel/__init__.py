"""Mesh, collectives, sharded layers and random bits: everything that knows about ranks (floor 1)."""

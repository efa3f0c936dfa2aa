"""Exploration methods: one file each, found by its name; base.py says which hooks they have."""

"""Collectives: the only folder where ranks speak to each other."""

"""Measurements of the product, each beside what it should be."""

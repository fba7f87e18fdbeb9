"""Readers of interactions, catalogues and users; splits; histories."""

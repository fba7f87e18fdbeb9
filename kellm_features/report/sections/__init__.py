"""The sections of the report: each function reads a `RunView` and returns what the template shows.

A stage that has not run is an `ArtifactError`, which the page shows in the section's place.
"""

"""Faces towards other libraries: one file each, which imports its library only when it is itself imported."""

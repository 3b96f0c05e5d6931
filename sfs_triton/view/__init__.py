"""Views of a generation: a canvas in the terminal, and plots."""

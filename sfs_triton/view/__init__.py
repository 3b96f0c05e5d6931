"""Views of a generation: a canvas in the terminal, animated pictures, and plots."""

"""Entry point of ``python -m sfs_triton.cli``."""

from .main import main

if __name__ == "__main__":
    main()

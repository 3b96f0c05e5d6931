"""``sfs_triton.kernels`` in a checkout, installed or not: the modules of ``../kernels/triton``.

A wheel has them as the package ``sfs_triton/kernels``, which Python finds before this file.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1] / "kernels" / "triton")]

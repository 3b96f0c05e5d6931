"""transformers: engines on the weights of a loaded model, ``generate(custom_generate=...)``, and registered classes.

Importing this package registers the classes of :mod:`.models`, so that ``AutoModelForMaskedLM`` and the other
automatic classes load LLaDA, iLLaDA and Dream checkpoints without remote code. The classes need version 5;
the rest also works with version 4, which the checkpoints' own code needs.
"""

from ...errors import MissingDependencyError

try:
    import transformers

    from .engines import TokenizerCodec, accelerate
    from .generate import Drafts, MaskedDiffusionOutput, custom_generate
except ImportError as error:
    raise MissingDependencyError(f'this needs transformers ({error}): pip install "sfs_triton[hf]"') from error

__all__ = ["Drafts", "MaskedDiffusionOutput", "TokenizerCodec", "accelerate", "custom_generate"]

if int(transformers.__version__.split(".")[0]) >= 5:
    from .models import register

    register()

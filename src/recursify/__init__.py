"""Turn pretrained LLMs into recursive ones.

Importing this package is instant: torch loads with the part that needs it. ``import recursify.modeling`` registers
recursive models with transformers, so that ``AutoModelForCausalLM.from_pretrained`` loads them without
``trust_remote_code``.
"""

from importlib.metadata import version

__version__ = version("recursify")

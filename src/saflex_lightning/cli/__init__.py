"""The commands ``saflex-train``, ``saflex`` and ``saflex-generate``."""
